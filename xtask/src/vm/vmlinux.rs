//! The kernel itself, out of the image that unpacks itself.
//!
//! An emulated processor takes seconds to unpack what this one unpacks in a
//! moment. QEMU can start the kernel directly if it was built for that
//! (`CONFIG_PVH`, as Debian's are); others are booted as they are.

use anyhow::{Context, Result, ensure};
use std::fs::{self, File};
use std::io::Write;
use std::path::Path;
use std::process::{Command, Stdio};

/// Offsets in the header of a bzImage, see the boot protocol.
const SETUP_SECTORS: usize = 0x1f1;
const MAGIC: usize = 0x202;
const PAYLOAD_OFFSET: usize = 0x248;
const PAYLOAD_LENGTH: usize = 0x24c;

/// Where QEMU is to start the kernel: a note by `Xen` of this type.
const PHYS32_ENTRY: u32 = 18;
const PT_NOTE: u32 = 4;

/// What a kernel can be packed with here, and its first bytes.
const PACKERS: [(&str, &[u8]); 3] = [
    ("xz", b"\xfd7zXZ\0"),
    ("zstd", b"\x28\xb5\x2f\xfd"),
    ("gzip", b"\x1f\x8b"),
];

/// Makes the image QEMU starts soonest.
pub(crate) fn make(vmlinuz: &Path, image: &Path) -> Result<()> {
    let bytes = fs::read(vmlinuz).with_context(|| format!("cannot read {}", vmlinuz.display()))?;
    let payload =
        payload(&bytes).with_context(|| format!("{} is no kernel image", vmlinuz.display()))?;
    let packer = PACKERS.iter().find(|(_, magic)| payload.starts_with(magic));
    if let Some((packer, _)) = packer {
        unpack(packer, payload, image)?;
        if starts_directly(&fs::read(image)?) {
            return Ok(());
        }
    }
    fs::copy(vmlinuz, image)?;
    Ok(())
}

/// The packed kernel in a bzImage.
fn payload(bytes: &[u8]) -> Option<&[u8]> {
    if bytes.get(MAGIC..MAGIC + 4)? != b"HdrS" {
        return None;
    }
    let setup = usize::from(*bytes.get(SETUP_SECTORS)?);
    // For historical reasons 0 means 4.
    let setup = if setup == 0 { 4 } else { setup };
    let start = (setup + 1) * 512 + u32_at(bytes, PAYLOAD_OFFSET)?;
    let length = u32_at(bytes, PAYLOAD_LENGTH)?;
    // Four bytes behind the packed ones are the unpacked size, except where
    // the format ends in it anyway.
    let appended = if bytes.get(start..)?.starts_with(PACKERS[2].1) {
        0
    } else {
        4
    };
    bytes.get(start..start + length.checked_sub(appended)?)
}

fn u32_at(bytes: &[u8], at: usize) -> Option<usize> {
    let bytes = bytes.get(at..at + 4)?.try_into().ok()?;
    usize::try_from(u32::from_le_bytes(bytes)).ok()
}

fn u64_at(bytes: &[u8], at: usize) -> Option<usize> {
    let bytes = bytes.get(at..at + 8)?.try_into().ok()?;
    usize::try_from(u64::from_le_bytes(bytes)).ok()
}

fn unpack(packer: &str, payload: &[u8], into: &Path) -> Result<()> {
    let mut child = Command::new(packer)
        .arg("-dc")
        .stdin(Stdio::piped())
        .stdout(File::create(into)?)
        .spawn()
        .with_context(|| format!("cannot run {packer}"))?;
    let mut stdin = child.stdin.take().context("no stdin")?;
    let written = stdin.write_all(payload);
    drop(stdin);
    ensure!(child.wait()?.success(), "{packer} cannot unpack the kernel");
    Ok(written?)
}

/// Whether it is an ELF file with the note that QEMU looks for.
fn starts_directly(elf: &[u8]) -> bool {
    elf.starts_with(b"\x7fELF\x02\x01") && find_entry(elf).is_some()
}

fn find_entry(elf: &[u8]) -> Option<()> {
    let headers = u64_at(elf, 0x20)?;
    let size = usize::from(u16::from_le_bytes(elf.get(0x36..0x38)?.try_into().ok()?));
    let count = usize::from(u16::from_le_bytes(elf.get(0x38..0x3a)?.try_into().ok()?));
    for header in (0..count).map(|number| headers + number * size) {
        if u32_at(elf, header)? != PT_NOTE as usize {
            continue;
        }
        let (start, length) = (u64_at(elf, header + 0x08)?, u64_at(elf, header + 0x20)?);
        let mut notes = elf.get(start..start.checked_add(length)?)?;
        while let (Some(name), Some(value), Some(kind)) =
            (u32_at(notes, 0), u32_at(notes, 4), u32_at(notes, 8))
        {
            if kind == PHYS32_ENTRY as usize && notes.get(12..12 + name)? == b"Xen\0" {
                return Some(());
            }
            let whole = 12 + name.next_multiple_of(4) + value.next_multiple_of(4);
            notes = notes.get(whole..)?;
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    fn note(name: &[u8], kind: u32, value: &[u8]) -> Vec<u8> {
        let mut note = Vec::new();
        note.extend(u32::try_from(name.len()).unwrap().to_le_bytes());
        note.extend(u32::try_from(value.len()).unwrap().to_le_bytes());
        note.extend(kind.to_le_bytes());
        for part in [name, value] {
            note.extend(part);
            note.resize(note.len().next_multiple_of(4), 0);
        }
        note
    }

    /// An ELF file with nothing but these notes.
    fn elf(notes: &[u8]) -> Vec<u8> {
        let mut elf = b"\x7fELF\x02\x01".to_vec();
        elf.resize(0x40, 0);
        elf[0x20] = 0x40;
        elf[0x36] = 0x38;
        elf[0x38] = 1;
        elf.extend(PT_NOTE.to_le_bytes());
        elf.resize(0x78, 0);
        elf[0x48] = 0x78;
        elf[0x60..0x68].copy_from_slice(&(notes.len() as u64).to_le_bytes());
        elf.extend(notes);
        elf
    }

    #[test]
    fn the_note_is_found() {
        let mut notes = note(b"Linux\0", PHYS32_ENTRY, b"x");
        notes.extend(note(b"Xen\0", 1, b"12345"));
        assert!(!starts_directly(&elf(&notes)));
        notes.extend(note(b"Xen\0", PHYS32_ENTRY, &[0; 8]));
        assert!(starts_directly(&elf(&notes)));
        for end in 0..elf(&notes).len() {
            // Cut off anywhere, it is none, and no panic.
            assert!(!starts_directly(&elf(&notes)[..end]));
        }
    }

    #[test]
    fn the_payload_is_found() {
        let mut image = vec![0; 1024];
        image[SETUP_SECTORS] = 1;
        image[MAGIC..MAGIC + 4].copy_from_slice(b"HdrS");
        image[PAYLOAD_OFFSET] = 8;
        image[PAYLOAD_LENGTH] = 10;
        image.extend([0; 8]);
        image.extend(b"packed");
        image.extend([6, 0, 0, 0]);
        assert_eq!(payload(&image), Some(&b"packed"[..]));
        assert_eq!(payload(&image[..image.len() - 5]), None);
        image[MAGIC] = 0;
        assert_eq!(payload(&image), None);
    }
}
