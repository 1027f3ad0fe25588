//! A directory that becomes a package.

use super::target::run;
use anyhow::{Context, Result};
use std::fs;
use std::io::Write;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// Files as they will be installed, below a directory. Owners and times are
/// left to whoever packs them.
pub(super) struct Tree {
    root: PathBuf,
}

impl Tree {
    /// An empty one.
    pub(super) fn new(root: PathBuf) -> Result<Self> {
        if root.exists() {
            fs::remove_dir_all(&root)?;
        }
        let tree = Self { root };
        tree.directory("")?;
        Ok(tree)
    }

    pub(super) fn root(&self) -> &Path {
        &self.root
    }

    pub(super) fn path(&self, to: &str) -> PathBuf {
        self.root.join(to)
    }

    /// A directory, and those above it. The umask of whoever runs this is not
    /// asked.
    pub(super) fn directory(&self, to: &str) -> Result<()> {
        let path = self.path(to);
        fs::create_dir_all(&path).with_context(|| path.display().to_string())?;
        let mut above = Some(path.as_path());
        while let Some(directory) = above.filter(|directory| directory.starts_with(&self.root)) {
            fs::set_permissions(directory, fs::Permissions::from_mode(0o755))?;
            above = directory.parent();
        }
        Ok(())
    }

    /// The directory that a file is going to be in.
    fn above(&self, to: &str) -> Result<PathBuf> {
        if let Some((directory, _)) = to.rsplit_once('/') {
            self.directory(directory)?;
        }
        Ok(self.path(to))
    }

    /// A file of these bytes.
    pub(super) fn write(&self, to: &str, bytes: impl AsRef<[u8]>, mode: u32) -> Result<()> {
        let path = self.above(to)?;
        fs::write(&path, bytes).with_context(|| path.display().to_string())?;
        fs::set_permissions(&path, fs::Permissions::from_mode(mode))?;
        Ok(())
    }

    /// A copy of a file.
    pub(super) fn copy(&self, file: &Path, to: &str, mode: u32) -> Result<()> {
        let bytes = fs::read(file).with_context(|| format!("cannot read {}", file.display()))?;
        self.write(to, bytes, mode)
    }

    /// A file made by somebody else, at a path that this says.
    pub(super) fn made(
        &self,
        to: &str,
        mode: u32,
        make: impl FnOnce(&Path) -> Result<()>,
    ) -> Result<()> {
        let path = self.above(to)?;
        make(&path)?;
        fs::set_permissions(&path, fs::Permissions::from_mode(mode))?;
        Ok(())
    }

    /// A file of these bytes, packed; `.gz` is added to its name.
    pub(super) fn packed(&self, to: &str, bytes: &[u8]) -> Result<()> {
        self.write(&format!("{to}.gz"), gzip(bytes)?, 0o644)
    }

    /// A symbolic link.
    pub(super) fn link(&self, at: &str, to: &str) -> Result<()> {
        Ok(symlink(to, self.above(at)?)?)
    }

    /// Paths of all files and symbolic links, sorted.
    pub(super) fn files(&self) -> Result<Vec<String>> {
        let listed = run(Command::new("find")
            .current_dir(&self.root)
            .args([".", "-path", "./DEBIAN", "-prune", "-o", "!", "-type", "d"])
            .args(["-printf", "%P\\n"]))?;
        let mut files: Vec<_> = listed.lines().map(str::to_owned).collect();
        files.sort();
        Ok(files)
    }
}

/// Packs bytes as Debian has it: as well as can be, and without a time.
fn gzip(bytes: &[u8]) -> Result<Vec<u8>> {
    let mut child = Command::new("gzip")
        .args(["-9nc"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .context("cannot run gzip")?;
    let mut stdin = child.stdin.take().context("no stdin")?;
    let bytes = bytes.to_vec();
    let writer = std::thread::spawn(move || stdin.write_all(&bytes));
    let output = child.wait_with_output()?;
    writer.join().ok().context("a thread panicked")??;
    anyhow::ensure!(output.status.success(), "gzip failed");
    Ok(output.stdout)
}
