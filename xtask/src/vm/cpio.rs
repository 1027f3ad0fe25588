//! Archives the kernel unpacks into its first root: cpio, format newc.

/// Where an entry's header puts its file type.
const DIRECTORY: u32 = 0o040_000;
const REGULAR: u32 = 0o100_000;
const CHARACTER_DEVICE: u32 = 0o020_000;

/// An archive. Several, one behind the other, are unpacked as one.
#[derive(Debug, Default)]
pub(crate) struct Archive {
    bytes: Vec<u8>,
    entries: u32,
}

impl Archive {
    /// Adds a directory; the one it lies in must be there.
    pub(crate) fn directory(&mut self, path: &str) {
        self.entry(path, DIRECTORY | 0o755, (0, 0), &[]);
    }

    /// Adds a file.
    pub(crate) fn file(&mut self, path: &str, permissions: u32, content: &[u8]) {
        self.entry(path, REGULAR | permissions, (0, 0), content);
    }

    /// Adds a character device.
    pub(crate) fn device(&mut self, path: &str, permissions: u32, number: (u32, u32)) {
        self.entry(path, CHARACTER_DEVICE | permissions, number, &[]);
    }

    fn entry(&mut self, path: &str, mode: u32, device: (u32, u32), content: &[u8]) {
        // Files of one number would be links to each other.
        self.entries += 1;
        let name = path.trim_start_matches('/');
        // The kernel takes no file of 4 GiB, nor do we have one.
        let size = u32::try_from(content.len()).unwrap_or(u32::MAX);
        let name_size = u32::try_from(name.len() + 1).unwrap_or(u32::MAX);
        let links = if mode & DIRECTORY == DIRECTORY { 2 } else { 1 };
        let fields = [
            self.entries,
            mode,
            0, // owner
            0, // group
            links,
            0, // time of modification
            size,
            0, // device it lies on
            0,
            device.0,
            device.1,
            name_size,
            0, // no checksum
        ];
        self.bytes.extend(b"070701");
        for field in fields {
            self.bytes.extend(format!("{field:08x}").bytes());
        }
        self.bytes.extend(name.bytes());
        self.bytes.push(0);
        self.align();
        self.bytes.extend(content);
        self.align();
    }

    fn align(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }

    /// The archive as it is unpacked.
    pub(crate) fn finish(mut self) -> Vec<u8> {
        self.entry("TRAILER!!!", 0, (0, 0), &[]);
        self.bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;
    use std::process::{Command, Stdio};

    #[test]
    fn an_entry_as_the_format_has_it() {
        let mut archive = Archive::default();
        archive.file("/a", 0o644, b"hello");
        let bytes = archive.finish();
        let expected = "070701\
             00000001000081a4000000000000000000000001000000000000000500000000\
             000000000000000000000000\
             0000000200000000\
             a\0hello\0\0\0";
        let text = String::from_utf8(bytes[..expected.len()].to_vec()).unwrap();
        assert_eq!(text, expected);
        assert!(bytes.len().is_multiple_of(4));
        assert!(String::from_utf8_lossy(&bytes).contains("TRAILER!!!"));
    }

    /// Where there is a cpio, it agrees.
    #[test]
    fn cpio_reads_it() {
        let mut archive = Archive::default();
        archive.directory("/dir");
        archive.file("/dir/longer name", 0o755, &[7; 4097]);
        archive.device("/console", 0o600, (5, 1));
        let child = Command::new("cpio")
            .args(["--list", "--verbose", "--numeric-uid-gid", "--quiet"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn();
        let Ok(mut child) = child else {
            return;
        };
        let mut stdin = child.stdin.take().unwrap();
        stdin.write_all(&archive.finish()).unwrap();
        drop(stdin);
        let output = child.wait_with_output().unwrap();
        assert!(output.status.success());
        let text = String::from_utf8(output.stdout).unwrap();
        let lines: Vec<_> = text.lines().collect();
        assert!(lines[0].starts_with("drwxr-xr-x"), "{text}");
        assert!(lines[1].contains(" 4097 "), "{text}");
        assert!(lines[1].ends_with("dir/longer name"), "{text}");
        assert!(lines[2].starts_with("crw-------"), "{text}");
        assert!(lines[2].contains("5,   1"), "{text}");
        assert_eq!(lines.len(), 3);
    }
}
