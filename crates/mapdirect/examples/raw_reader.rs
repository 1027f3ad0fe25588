//! A reader of raw blocks: it copies a file to its output by reading the block
//! device with O_DIRECT, at the places that the file's block map names.
//!
//! ```sh
//! cargo run --example raw_reader -- FILE > copy             # as root
//! cargo run --example raw_reader -- FILE /dev/sdb1 > copy
//! cargo run --example raw_reader -- FILE --disk > copy      # from the whole disk
//! ```
//!
//! With `--disk` it opens no partition and no logical volume, but the whole disks
//! below them, as an agent does that has only those.
//!
//! Without a pin that would be a gamble: the filesystem may give the blocks to
//! another file between the look at the block map and the read. A DMA engine or an
//! NVMe passthrough reader does the same with the same extents.

use mapdirect::{BlockDevice, DiskLayout, Extent, ExtentState, PinOptions, Place};
use rustix::fs::OFlags;
use std::error::Error;
use std::fs::File;
use std::io::Write;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;

/// What a program that goes wrong returns.
pub type Result<T> = std::result::Result<T, Box<dyn Error>>;

/// What offsets, lengths and memory of a direct read are a multiple of, on any
/// device.
const ALIGNMENT: usize = 4096;
/// Bytes read at a time.
const PIECE: usize = 1 << 20;

/// Opens a device for direct reads.
fn open(path: &Path) -> Result<File> {
    Ok(File::options()
        .read(true)
        .custom_flags(OFlags::DIRECT.bits().cast_signed())
        .open(path)?)
}

fn path_of(device: &BlockDevice) -> Result<&Path> {
    let path = device.path.as_deref();
    Ok(path.ok_or_else(|| format!("{} has no device file", device.name))?)
}

/// Where the bytes come from.
enum Source {
    /// A device that shows what the filesystem lies on.
    Device(File),
    /// The disks below it, and where the bytes are on them.
    Disks(DiskLayout),
}

impl Source {
    fn of(file: &File, argument: Option<&str>) -> Result<Self> {
        Ok(match argument {
            Some("--disk") => Self::Disks(BlockDevice::of(file)?.layout()),
            Some(path) => Self::Device(open(Path::new(path))?),
            None => Self::Device(open(path_of(&BlockDevice::of(file)?)?)?),
        })
    }

    /// Reads bytes at an offset of the device that the filesystem lies on.
    fn read(&self, bytes: &mut [u8], offset: u64) -> Result<()> {
        let layout = match self {
            Self::Device(device) => return Ok(device.read_exact_at(bytes, offset)?),
            Self::Disks(layout) => layout,
        };
        let end = offset + u64::try_from(bytes.len())?;
        let mut rest = bytes;
        for run in layout.locate(offset..end) {
            let (bytes, next) = rest.split_at_mut(usize::try_from(run.length)?);
            match &run.place {
                Place::Disk { disk, offset } => {
                    open(path_of(disk)?)?.read_exact_at(bytes, *offset)?;
                }
                Place::Unknown { reason } => return Err(reason.clone().into()),
                _ => return Err("a place of a kind that is not known".into()),
            }
            rest = next;
        }
        Ok(())
    }
}

/// Memory for direct reads: `PIECE` bytes at a multiple of `ALIGNMENT`.
struct Aligned(Vec<u8>);

impl Aligned {
    fn new() -> Self {
        Self(vec![0; PIECE + ALIGNMENT])
    }

    fn bytes(&mut self) -> &mut [u8] {
        let start = self.0.as_ptr().align_offset(ALIGNMENT);
        &mut self.0[start..start + PIECE]
    }
}

/// Copies the bytes of an extent before the end of the file.
fn copy(
    source: &Source,
    extent: &Extent,
    file_size: u64,
    memory: &mut Aligned,
    output: &mut impl Write,
) -> Result<()> {
    let mut at = extent.offset;
    while at < extent.end().min(file_size) {
        let left = extent.end().min(file_size) - at;
        let count = usize::try_from(left.min(PIECE as u64))?;
        let bytes = memory.bytes();
        match (extent.state, extent.physical) {
            (ExtentState::Written | ExtentState::Shared, Some(start)) => {
                // The last read ends with a whole block, beyond the file's end.
                let whole = count.next_multiple_of(ALIGNMENT);
                source.read(&mut bytes[..whole], start + at - extent.offset)?;
            }
            // A hole has no blocks. An unwritten extent has, with whatever was
            // in them before they became part of this file: never show it.
            (ExtentState::Hole | ExtentState::Unwritten, _) => bytes[..count].fill(0),
            (other, _) => return Err(format!("bytes at {at} are {other}").into()),
        }
        output.write_all(&bytes[..count])?;
        at += count as u64;
    }
    Ok(())
}

/// Does what the command line says.
pub fn run(arguments: &[String]) -> Result<()> {
    let (file, from) = match arguments {
        [file] => (file, None),
        [file, from] => (file, Some(&**from)),
        _ => return Err("usage: raw_reader FILE [DEVICE|--disk]".into()),
    };
    let file = File::open(file)?;
    // When this returns, everything that was written is on the device, and the
    // extents are true.
    let pin = PinOptions::new().pin(&file)?;
    let source = Source::of(&file, from)?;
    let mut output = std::io::stdout().lock();
    let mut memory = Aligned::new();
    let size = pin.block_map().file_size();
    for extent in pin.extents() {
        copy(&source, extent, size, &mut memory, &mut output)?;
    }
    output.flush()?;
    // They were true all the time, if the pin is still kept.
    if !pin.state().is_kept() {
        return Err(format!("the copy is worth nothing: {}", pin.state()).into());
    }
    pin.unpin()?;
    Ok(())
}

fn main() -> Result<()> {
    run(&std::env::args().skip(1).collect::<Vec<_>>())
}
