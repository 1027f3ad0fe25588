//! Packages for Debian, with the tools that Debian builds its own with.

use super::target::{Built, run, strip};
use super::tree::Tree;
use super::{Release, VERSION, completions, documents, licences, packaging, pages, units};
use crate::{build, capi, packages};
use anyhow::{Context, Result, ensure};
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Those of the package that the others are beside.
const MAIN: &str = "mapdirect";
const LIBRARY: &str = "libmapdirect0";
const DEVELOPMENT: &str = "libmapdirect-dev";
const PYTHON: &str = "python3-mapdirect";

/// What is in a package, and which crates are built into it.
struct Package<'a> {
    name: &'static str,
    fill: &'a dyn Fn(&Tree) -> Result<()>,
    crates: &'static [&'static str],
}

/// Makes all of them, and returns the names of their files.
pub(super) fn make(
    release: &Release,
    built: &Built,
    stage: &Path,
    output: &Path,
) -> Result<Vec<String>> {
    let contents = Contents { release, built };
    let workplace = Workplace::new(release, stage)?;
    // A test for an architecture alone makes the rest as well: it is the same.
    let packages = [
        Package {
            name: MAIN,
            fill: &|tree| contents.command(tree),
            crates: &["mapdirect-cli"],
        },
        Package {
            name: LIBRARY,
            fill: &|tree| contents.library(tree),
            crates: &["mapdirect-capi", "mapdirect-mmap"],
        },
        Package {
            name: DEVELOPMENT,
            fill: &|tree| contents.development(tree),
            crates: &["mapdirect-capi"],
        },
        Package {
            name: PYTHON,
            fill: &|tree| contents.python(tree),
            crates: &[],
        },
    ];
    packages
        .iter()
        .map(|package| workplace.make(package, output))
        .collect()
}

/// What belongs into the packages.
struct Contents<'a> {
    release: &'a Release,
    built: &'a Built,
}

impl Contents<'_> {
    fn strip(&self, tree: &Tree, file: &Path, to: &str, mode: u32) -> Result<()> {
        tree.made(to, mode, |to| strip(self.release.arch, file, to))
    }

    fn libraries(&self) -> String {
        format!("usr/lib/{}", self.release.arch.gnu())
    }

    fn command(&self, tree: &Tree) -> Result<()> {
        self.strip(tree, &self.built.command, "usr/bin/mapdirect", 0o755)?;
        for (place, text) in pages()? {
            if !is_for_programmers(&place) {
                tree.packed(&format!("usr/share/man/{place}"), &text)?;
            }
        }
        for completion in completions::all()? {
            tree.write(completion.in_debian, &completion.text, 0o644)?;
        }
        for (unit, text) in units()? {
            tree.write(&format!("lib/systemd/system/{unit}"), text, 0o644)?;
        }
        let configuration = packaging("etc")?;
        ensure!(
            configuration.iter().any(|(name, _)| name == "policy.toml"),
            "there is no packaging/etc/policy.toml"
        );
        tree.directory("etc/mapdirect/policy.d")?;
        for (name, path) in configuration {
            tree.copy(&path, &format!("etc/mapdirect/{name}"), 0o644)?;
        }
        for (name, path) in documents()? {
            let to = format!("usr/share/doc/{MAIN}/{name}");
            tree.copy(&path, &to, 0o644)?;
        }
        Ok(())
    }

    fn library(&self, tree: &Tree) -> Result<()> {
        let directory = self.libraries();
        for (file, name) in [
            (&self.built.shared, "libmapdirect.so"),
            (&self.built.mmap, "libmapdirect-mmap.so"),
        ] {
            let real = format!("{name}.{VERSION}");
            self.strip(tree, file, &format!("{directory}/{real}"), 0o644)?;
            tree.link(&format!("{directory}/{name}.0"), &real)?;
        }
        // By this name it is given to LD_PRELOAD.
        tree.link(
            &format!("{directory}/libmapdirect-mmap.so"),
            "libmapdirect-mmap.so.0",
        )
    }

    fn development(&self, tree: &Tree) -> Result<()> {
        let directory = self.libraries();
        let archive = format!("{directory}/libmapdirect.a");
        self.strip(tree, &self.built.archive, &archive, 0o644)?;
        tree.link(&format!("{directory}/libmapdirect.so"), "libmapdirect.so.0")?;
        let relative = directory.trim_start_matches("usr/");
        let pc = capi::pkg_config("/usr", relative)?;
        tree.write(&format!("{directory}/pkgconfig/mapdirect.pc"), pc, 0o644)?;
        tree.copy(&capi::header_file(), "usr/include/mapdirect.h", 0o644)?;
        for (place, text) in pages()? {
            if is_for_programmers(&place) {
                tree.packed(&format!("usr/share/man/{place}"), &text)?;
            }
        }
        examples(tree, "c", DEVELOPMENT)
    }

    fn python(&self, tree: &Tree) -> Result<()> {
        let modules = "usr/lib/python3/dist-packages";
        let source = build::workspace().join("python/src/mapdirect");
        for entry in fs::read_dir(&source)? {
            let entry = entry?;
            let name = entry.file_name().to_string_lossy().into_owned();
            if entry.file_type()?.is_file() {
                tree.copy(&entry.path(), &format!("{modules}/mapdirect/{name}"), 0o644)?;
            }
        }
        let project = fs::read_to_string(build::workspace().join("python/pyproject.toml"))?;
        let field = |name: &str| {
            let line = project.lines().find_map(|line| {
                let (key, value) = line.split_once(" = ")?;
                (key == name).then_some(value.trim_matches('"'))
            });
            line.with_context(|| format!("pyproject.toml has no {name}"))
        };
        ensure!(
            field("version")? == VERSION,
            "python/pyproject.toml has the version {}, and Cargo.toml {VERSION}",
            field("version")?
        );
        let metadata = format!(
            "Metadata-Version: 2.1\nName: mapdirect\nVersion: {VERSION}\nSummary: {}\n\
             License: MIT OR Apache-2.0\nRequires-Python: {}\n",
            field("description")?,
            field("requires-python")?
        );
        let information = format!("{modules}/mapdirect-{VERSION}.dist-info");
        tree.write(&format!("{information}/METADATA"), metadata, 0o644)?;
        tree.copy(
            &build::workspace().join("python/README.md"),
            &format!("usr/share/doc/{PYTHON}/README.md"),
            0o644,
        )?;
        examples(tree, "python", PYTHON)
    }
}

fn examples(tree: &Tree, language: &str, package: &str) -> Result<()> {
    let directory = build::workspace().join("examples").join(language);
    for entry in fs::read_dir(directory)? {
        let entry = entry?;
        let name = entry.file_name().to_string_lossy().into_owned();
        let to = format!("usr/share/doc/{package}/examples/{name}");
        if entry.file_type()?.is_file() {
            tree.copy(&entry.path(), &to, 0o644)?;
        }
    }
    Ok(())
}

/// Whether a manual page is about calls.
fn is_for_programmers(place: &str) -> bool {
    place.starts_with("man2/") || place.starts_with("man3/")
}

/// Where the tools of Debian find what they want to know of a source package.
struct Workplace<'a> {
    release: &'a Release,
    directory: PathBuf,
}

impl<'a> Workplace<'a> {
    fn new(release: &'a Release, directory: &Path) -> Result<Self> {
        let of = |name: &str| std::env::var(name).ok().filter(|value| !value.is_empty());
        let maintainer = format!(
            "{} <{}>",
            of("DEBFULLNAME")
                .as_deref()
                .unwrap_or("The mapdirect authors"),
            of("DEBEMAIL")
                .as_deref()
                .unwrap_or("mapdirect@packages.invalid")
        );
        let date = run(Command::new("date").args(["-uR", "-d", &format!("@{}", release.epoch)]))?;
        let about = directory.join("debian");
        fs::create_dir_all(&about)?;
        let control = fs::read_to_string(own("control"))?.replace("@MAINTAINER@", &maintainer);
        fs::write(about.join("control"), control)?;
        fs::write(
            about.join("changelog"),
            format!(
                "mapdirect ({}) unstable; urgency=medium\n\n  * What is new is in changelog.gz.\n\n \
                 -- {maintainer}  {date}",
                release.version()
            ),
        )?;
        for (name, path) in packaging("debian")? {
            if name.ends_with(".symbols") {
                fs::copy(path, about.join(name))?;
            }
        }
        Ok(Self {
            release,
            directory: directory.to_owned(),
        })
    }

    /// One of Debian's tools.
    fn tool(&self, name: &str) -> Command {
        let mut command = Command::new(name);
        command
            .current_dir(&self.directory)
            .env("SOURCE_DATE_EPOCH", &self.release.epoch)
            .env("DEB_HOST_ARCH", self.release.arch.debian())
            .env("LC_ALL", "C");
        command
    }

    fn make(&self, package: &Package<'_>, output: &Path) -> Result<String> {
        let name = package.name;
        println!("packing {name}");
        let tree = Tree::new(self.directory.join(name))?;
        (package.fill)(&tree)?;
        self.documents(&tree, package)?;
        for (file, path) in packaging("debian")? {
            let Some(part) = file
                .strip_prefix(name)
                .and_then(|rest| rest.strip_prefix('.'))
            else {
                continue;
            };
            match part {
                "postinst" | "prerm" | "postrm" | "preinst" => {
                    tree.copy(&path, &format!("DEBIAN/{part}"), 0o755)?;
                }
                "triggers" => tree.copy(&path, "DEBIAN/triggers", 0o644)?,
                "lintian-overrides" => {
                    tree.copy(&path, &format!("usr/share/lintian/overrides/{name}"), 0o644)?;
                }
                // For the tools below.
                "symbols" => {}
                other => anyhow::bail!("packaging/debian/{file}: what is .{other}?"),
            }
        }
        self.control(&tree, name)?;
        let all = fs::read_to_string(tree.path("DEBIAN/control"))?;
        let arch = field(&all, "Architecture").context("a package without architecture")?;
        let file = format!("{name}_{}_{arch}.deb", self.release.version());
        // One thread packs the same everywhere.
        run(self
            .tool("dpkg-deb")
            .args(["--root-owner-group", "-Zxz", "--threads-max=1", "--build"])
            .arg(tree.root())
            .arg(std::path::absolute(output)?.join(&file)))?;
        Ok(file)
    }

    /// What every package has.
    fn documents(&self, tree: &Tree, package: &Package<'_>) -> Result<()> {
        let place = format!("usr/share/doc/{}", package.name);
        let news = fs::read(build::workspace().join("CHANGELOG.md"))?;
        tree.packed(&format!("{place}/changelog"), &news)?;
        let own = fs::read(self.directory.join("debian/changelog"))?;
        tree.packed(&format!("{place}/changelog.Debian"), &own)?;
        let copyright = licences::text(self.release.arch, package.crates)?;
        tree.write(&format!("{place}/copyright"), copyright, 0o644)
    }

    /// What dpkg is told of a package.
    fn control(&self, tree: &Tree, name: &str) -> Result<()> {
        let files = tree.files()?;
        let variables = format!("debian/{name}.substvars");
        let mut programs = Vec::new();
        for file in &files {
            let path = tree.path(file);
            let is_file = fs::symlink_metadata(&path)?.is_file();
            if is_file && fs::read(&path)?.starts_with(b"\x7fELF") {
                programs.push(path);
            }
        }
        tree.directory("DEBIAN")?;
        if own(&format!("{name}.symbols")).exists() {
            let mut symbols = self.tool("dpkg-gensymbols");
            symbols.args([&format!("-p{name}"), &format!("-v{VERSION}"), "-c4"]);
            symbols.arg(format!("-P{}", tree.root().display()));
            run(&mut symbols).with_context(|| {
                format!("packaging/debian/{name}.symbols is not what the library has")
            })?;
            let shlibs: String = ["libmapdirect", "libmapdirect-mmap"]
                .map(|library| format!("{library} 0 {name} (>= {VERSION})\n"))
                .concat();
            tree.write("DEBIAN/shlibs", shlibs, 0o644)?;
        }
        if programs.is_empty() {
            fs::write(self.directory.join(&variables), "")?;
        } else {
            let mut needs = self.tool("dpkg-shlibdeps");
            needs.arg(format!("-T{variables}")).args(&programs);
            run(&mut needs)?;
        }
        let mut control = self.tool("dpkg-gencontrol");
        control.args([&format!("-p{name}"), &format!("-T{variables}")]);
        control.arg(format!("-P{}", tree.root().display()));
        run(&mut control)?;
        let settings: String = files
            .iter()
            .filter(|file| file.starts_with("etc/"))
            .map(|file| format!("/{file}\n"))
            .collect();
        if !settings.is_empty() {
            tree.write("DEBIAN/conffiles", settings, 0o644)?;
        }
        let contents: Vec<_> = files
            .iter()
            .filter(|file| !tree.path(file).is_symlink())
            .collect();
        let sums = run(Command::new("md5sum")
            .current_dir(tree.root())
            .args(contents))?;
        tree.write("DEBIAN/md5sums", sums, 0o644)
    }
}

fn own(file: &str) -> PathBuf {
    build::workspace().join("packaging/debian").join(file)
}

/// The value of a field in one line.
fn field<'t>(control: &'t str, name: &str) -> Option<&'t str> {
    let mut lines = control.lines();
    lines.find_map(|line| line.strip_prefix(name)?.strip_prefix(": "))
}

/// Has lintian look at the packages, where it is: its errors are errors.
pub(super) fn lint(output: &Path, made: &[String]) -> Result<()> {
    if !packages::exists("lintian") {
        println!("lintian is not here, and has not looked at the packages");
        return Ok(());
    }
    println!("having lintian look at the packages");
    let packages: Vec<_> = made.iter().filter(|file| file.ends_with(".deb")).collect();
    let output = Command::new("lintian")
        .args([
            "--allow-root",
            "--fail-on",
            "error",
            "--tag-display-limit=0",
        ])
        // Nobody has asked Debian for it.
        .args(["--suppress-tags", "initial-upload-closes-no-bugs"])
        .args(packages)
        .current_dir(output)
        .output()
        .context("cannot run lintian")?;
    let told = String::from_utf8_lossy(&output.stdout);
    let complaints = String::from_utf8_lossy(&output.stderr);
    let mut of: BTreeMap<&str, u32> = BTreeMap::new();
    for line in told.lines().chain(complaints.lines()) {
        println!("  {line}");
        *of.entry(line.split(':').next().unwrap_or_default())
            .or_default() += 1;
    }
    ensure!(output.status.success(), "lintian found errors");
    println!(
        "lintian: no errors, {} warnings",
        of.get("W").copied().unwrap_or(0)
    );
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_for_programmers_go_with_the_header() {
        assert!(is_for_programmers("man3/mapdirect.3"));
        assert!(is_for_programmers("man2/MAP_DIRECT.2const"));
        assert!(!is_for_programmers("man7/mapdirect.7"));
    }

    #[test]
    fn fields_are_found() {
        let control = "Package: a\nArchitecture: arm64\nDescription: b\n c\n";
        assert_eq!(field(control, "Architecture"), Some("arm64"));
        assert_eq!(field(control, "Depends"), None);
    }
}
