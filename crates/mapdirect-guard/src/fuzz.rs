//! The fuzz targets: every parser of this crate, with checks of what it
//! returns. The seeds are bytes such as the kernel and other programs write.

use crate::tripwire::fuzz as tripwire;
use crate::{delegation, exports, listeners};
use mapdirect_sys::fuzz::Target;

/// The parsers of this crate.
#[must_use]
pub fn targets() -> Vec<Target> {
    #[cfg_attr(
        not(feature = "bpf"),
        expect(unused_mut, reason = "there are more with the bpf gate")
    )]
    let mut targets = vec![
        Target {
            name: "exports",
            run: exports,
            seeds: &[
                b"# Version 1.1\n/srv/a\\040b\t*(rw,no_root_squash,crossmnt,fsid=0) # 10.0.0.1\n",
                b"/srv\thost(ro,sync)\n/srv\tother(rw,sync,sec=sys)\n/all\n",
            ],
        },
        Target {
            name: "fanotify-marks",
            run: fanotify_marks,
            seeds: &[
                b"fanotify flags:10 event-flags:8000\nfanotify mnt_id:1d mflags:0 mask:30000 \
                  ignored_mask:0\nfanotify ino:83 sdev:700000 mflags:0 mask:10000 ignored_mask:0\n",
            ],
        },
        Target {
            name: "tracefs-format",
            run: tripwire::format,
            seeds: &[tripwire::SEED],
        },
        Target {
            name: "processors",
            run: tripwire::processors,
            seeds: &[b"0-3,5\n"],
        },
        Target {
            name: "journal",
            run: crate::journal::fuzz,
            seeds: &[&[0; 64], &[1; 256]],
        },
        Target {
            name: "policy",
            run: policy,
            seeds: &[
                b"[[rule]]\nname = \"db\"\nusers = [7, \"root\"]\ngroups = [8]\npaths = \
                  [\"/srv/*\"]\naccess = \"write\"\npins = 2\nbytes = \"1G\"\nseconds = 9\n",
                b"rule = [{name = 'a', users = [1], paths = ['/'], access = 'read'}] # \xc3\xa4\n",
            ],
        },
    ];
    #[cfg(feature = "bpf")]
    targets.extend(crate::gate::bpf::fuzz::TARGETS);
    targets
}

/// Every rule that is understood names somebody and some path, and no two have
/// the same name; whatever is wrong is on a line of the text.
fn policy(bytes: &[u8]) {
    let text = String::from_utf8_lossy(bytes);
    let path = std::path::Path::new("policy.toml");
    match delegation::parse(path, &text, &delegation::Names::of_machine()) {
        Ok(rules) => {
            for (at, rule) in rules.iter().enumerate() {
                assert!(!rule.paths().is_empty() && rule.pins > 0);
                assert!(rules[..at].iter().all(|other| other.name != rule.name));
                for path in rule.paths() {
                    // Without a star a path covers itself.
                    assert!(path.contains('*') || rule.covers(std::path::Path::new(&path)));
                    let again = delegation::Pattern::parse(&path);
                    assert_eq!(again.map(|again| again.to_string()), Ok(path));
                }
            }
        }
        Err(errors) => {
            assert!(!errors.is_empty());
            let lines = text.split('\n').count();
            for (line, column) in errors.iter().filter_map(|error| error.place) {
                assert!(line <= lines && column <= text.len() + 1);
            }
        }
    }
}

fn exports(bytes: &[u8]) {
    exports::fuzz(&String::from_utf8_lossy(bytes));
}

fn fanotify_marks(bytes: &[u8]) {
    let id = crate::table::InodeId {
        dev: 0x700,
        inode: 131,
    };
    let text = String::from_utf8_lossy(bytes);
    let asked = listeners::may_be_asked(&text, id, |_| Some(id.dev));
    // Only a group with the mark of a permission event is asked.
    assert!(!asked || text.contains("fanotify "));
}

#[cfg(test)]
mod tests {
    #[test]
    fn seeds_make_sense() {
        for target in super::targets() {
            for seed in target.seeds {
                for end in 0..=seed.len() {
                    (target.run)(&seed[..end]);
                }
            }
        }
    }
}
