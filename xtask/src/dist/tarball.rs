//! The tarball, to be unpacked below `/usr/local`.

use super::target::{Built, run, strip};
use super::tree::Tree;
use super::{Release, VERSION, completions, documents, licences, packaging, pages, units};
use crate::{build, capi};
use anyhow::Result;
use std::path::Path;
use std::process::Command;

/// Makes it and returns its name.
pub(super) fn make(
    release: &Release,
    built: &Built,
    stage: &Path,
    output: &Path,
) -> Result<String> {
    let arch = release.arch;
    let name = format!("mapdirect-{VERSION}-{}", arch.name());
    println!("packing {name}.tar.xz");
    let tree = Tree::new(stage.join("tarball").join(&name))?;
    let stripped = |file: &Path, to: &str, mode| tree.made(to, mode, |to| strip(arch, file, to));
    stripped(&built.command, "bin/mapdirect", 0o755)?;
    for (file, name) in [
        (&built.shared, "libmapdirect.so"),
        (&built.mmap, "libmapdirect-mmap.so"),
    ] {
        stripped(file, &format!("lib/{name}.{VERSION}"), 0o644)?;
        tree.link(&format!("lib/{name}.0"), &format!("{name}.{VERSION}"))?;
        tree.link(&format!("lib/{name}"), &format!("{name}.0"))?;
    }
    stripped(&built.archive, "lib/libmapdirect.a", 0o644)?;
    let pc = capi::pkg_config("/usr/local", "lib")?;
    tree.write("lib/pkgconfig/mapdirect.pc", pc, 0o644)?;
    tree.copy(&capi::header_file(), "include/mapdirect.h", 0o644)?;
    for (place, text) in pages()? {
        tree.packed(&format!("share/man/{place}"), &text)?;
    }
    for completion in completions::all()? {
        tree.write(completion.elsewhere, &completion.text, 0o644)?;
    }
    for (unit, text) in units()? {
        let text = text.replace("/usr/bin/mapdirect", "/usr/local/bin/mapdirect");
        tree.write(&format!("lib/systemd/system/{unit}"), text, 0o644)?;
    }
    for (file, path) in packaging("etc")? {
        tree.copy(&path, &format!("share/doc/mapdirect/etc/{file}"), 0o644)?;
    }
    for (document, path) in documents()? {
        tree.copy(&path, &format!("share/doc/mapdirect/{document}"), 0o644)?;
    }
    for file in ["LICENSE-MIT", "LICENSE-APACHE", "CHANGELOG.md"] {
        let path = build::workspace().join(file);
        tree.copy(&path, &format!("share/doc/mapdirect/{file}"), 0o644)?;
    }
    let copyright = licences::text(arch, &["mapdirect-cli", "mapdirect-capi", "mapdirect-mmap"])?;
    tree.write("share/doc/mapdirect/copyright", copyright, 0o644)?;
    let file = format!("{name}.tar.xz");
    let mut tar = Command::new("tar");
    tar.args(["--sort=name", "--format=gnu", "--owner=0", "--group=0"])
        .args(["--numeric-owner", &format!("--mtime=@{}", release.epoch)])
        // One thread packs the same everywhere.
        .args(["--use-compress-program=xz -6 -T1", "--create", "--file"])
        .arg(std::path::absolute(output)?.join(&file))
        .arg(&name)
        .current_dir(stage.join("tarball"));
    run(&mut tar)?;
    Ok(file)
}
