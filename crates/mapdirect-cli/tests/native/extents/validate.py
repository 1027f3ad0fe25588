"""Checks documents against the schemas in a directory, and the schemas themselves.

Standard input is JSON: a list of [name of a schema, document]. Every document must
be what its schema says. And it must not be any more once it says something else: a
new key in any object, or one key less at the top.
"""

import json
import pathlib
import sys
import warnings

warnings.simplefilter("ignore", DeprecationWarning)
import jsonschema  # noqa: E402

directory = pathlib.Path(sys.argv[1]).resolve()
failures = []


def load(path):
    schema = json.loads(path.read_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    resolver = jsonschema.RefResolver(base_uri=path.as_uri(), referrer=schema)
    return schema, jsonschema.Draft202012Validator(schema, resolver=resolver)


def closed(schema, place):
    """Every object that lists its keys takes no others."""
    if isinstance(schema, dict):
        if "properties" in schema and not place.endswith("/properties"):
            if schema.get("additionalProperties") is not False:
                failures.append(f"{place} takes keys that it does not list")
            if set(schema["properties"]) != set(schema.get("required", [])):
                failures.append(f"{place} lists keys that may be missing")
        for key, value in schema.items():
            closed(value, f"{place}/{key}")
    elif isinstance(schema, list):
        for at, value in enumerate(schema):
            closed(value, f"{place}/{at}")


def with_one_more(value, path=()):
    """The document with a key more in one of its objects, object by object."""
    if isinstance(value, dict):
        # Operations are the keys of this one.
        if path[-1:] != ("refused",):
            yield {**value, "surprise": 1}, path
        for key, inner in value.items():
            for changed, where in with_one_more(inner, (*path, key)):
                yield {**value, key: changed}, where
    elif isinstance(value, list):
        for at, inner in enumerate(value[:3]):
            for changed, where in with_one_more(inner, (*path, at)):
                yield [*value[:at], changed, *value[at + 1 :]], where


validators = {}
for path in sorted(directory.glob("*.json")):
    schema, validators[path.stem] = load(path)
    closed(schema, path.name)

for name, document in json.load(sys.stdin):
    validator = validators[name]
    for error in validator.iter_errors(document):
        where = "/".join(map(str, error.absolute_path))
        failures.append(f"{name}: at {where or 'the top'}: {error.message[:300]}")
    for changed, where in with_one_more(document):
        if validator.is_valid(changed):
            failures.append(f"{name}: at {where}: a new key goes unnoticed")
    top = document if isinstance(document, dict) else {}
    for key in top:
        if validator.is_valid({k: v for k, v in top.items() if k != key}):
            failures.append(f"{name}: {key} may be missing")

print("\n".join(failures))
sys.exit(bool(failures))
