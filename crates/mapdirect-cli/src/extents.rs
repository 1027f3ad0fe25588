//! The extents of a file in the forms that agents need.

use crate::args::Format;
use crate::draw;
use anyhow::{Context, Result, bail, ensure};
use mapdirect::{
    BlockDevice, BlockMap, DiskLayout, DiskRun, Extent, ExtentState, Place, RawAccess, Strength,
};
use mapdirect_sys::mmap::page_size;
use mapdirect_sys::proc::printable;
use serde_json::{Value, json};
use std::fmt::Write;
use std::fs::File;
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt};
use std::path::Path;

/// Bytes of the sectors that the device-mapper counts in.
const SECTOR: u64 = 512;

/// A block map, and where it is on devices.
pub(crate) struct Extents<'map> {
    map: &'map BlockMap,
    strength: Strength,
    /// The device that the map counts on, or why it is not known.
    device: Result<(BlockDevice, DiskLayout), String>,
}

impl<'map> Extents<'map> {
    /// Those of a file that may lie anywhere.
    pub(crate) fn of(file: &File, map: &'map BlockMap) -> Self {
        Self::on(map, Strength::All, BlockDevice::of(file))
    }

    /// Those of a file that is pinned, and so lies where that is possible.
    pub(crate) fn pinned(map: &'map BlockMap, strength: Strength) -> Self {
        Self::on(map, strength, BlockDevice::with_id(map.device()))
    }

    fn on(map: &'map BlockMap, strength: Strength, device: mapdirect::Result<BlockDevice>) -> Self {
        let device = device
            .map(|device| {
                let layout = device.layout();
                (device, layout)
            })
            .map_err(|error| error.obstacle().to_owned());
        Self {
            map,
            strength,
            device,
        }
    }

    /// In a form for programs, or as a table.
    ///
    /// # Errors
    ///
    /// When the extents cannot be said in this form.
    pub(crate) fn say(
        &self,
        format: Format,
        file: Option<&File>,
        table_device: Option<&Path>,
    ) -> Result<String> {
        ensure!(
            table_device.is_none() || format == Format::Dmsetup,
            "--device is for a table for dmsetup"
        );
        match format {
            Format::Table => Ok(self.table()),
            Format::Json => Ok(self.list().to_string()),
            Format::Csv => Ok(self.csv()),
            Format::Dmsetup => self.dmsetup(table_device),
            Format::ResumeOffset => self.resume_offset(file),
        }
    }

    /// What an agent may do to the blocks of an extent: nothing if nobody knows
    /// on which device they are.
    pub(crate) fn access(&self, extent: &Extent) -> RawAccess {
        match self.device {
            Ok(_) => access_under(self.strength, extent.state),
            Err(_) => RawAccess::None,
        }
    }

    /// Where an extent is on disks; nothing if it has no blocks, or the device is
    /// not known.
    pub(crate) fn runs(&self, extent: &Extent) -> Vec<DiskRun> {
        match &self.device {
            Ok((_, layout)) => layout.locate_extent(extent),
            Err(_) => Vec::new(),
        }
    }

    pub(crate) fn table(&self) -> String {
        let places = |extent: &Extent| {
            let runs = self.runs(extent);
            let place = |run: &DiskRun| match run.place.known() {
                Some((disk, offset)) => format!("{} {offset}", disk.name),
                None => String::from("unknown"),
            };
            runs.iter().map(place).collect::<Vec<_>>().join(", ")
        };
        let mut table = draw::extent_table(self.map, places);
        if let Some(reason) = self.unknown() {
            let _ = writeln!(
                table,
                "where it is on the disk cannot be known: {}",
                printable(&reason)
            );
        }
        table
    }

    /// Why the place on a disk is not known of all extents, if it is not.
    fn unknown(&self) -> Option<String> {
        match &self.device {
            Err(reason) => Some(reason.clone()),
            Ok(_) => self
                .map
                .extents()
                .iter()
                .flat_map(|extent| self.runs(extent))
                .find_map(|run| match run.place {
                    Place::Unknown { reason } => Some(reason),
                    _ => None,
                }),
        }
    }

    /// Every extent, for programs.
    pub(crate) fn list(&self) -> Value {
        let extent = |extent: &Extent| {
            let mut value = crate::json::extent(extent);
            value["access"] = self.access(extent).name().into();
            value["disk"] = self.runs(extent).iter().map(run_json).collect();
            value
        };
        self.map.extents().iter().map(extent).collect()
    }

    /// The devices that the extents are on, for programs: added to an object.
    pub(crate) fn add_devices(&self, value: &mut Value) {
        let mut disks: Vec<&BlockDevice> = Vec::new();
        if let Ok((_, layout)) = &self.device {
            for (disk, _) in layout.runs().iter().filter_map(|run| run.place.known()) {
                if !disks.contains(&disk) {
                    disks.push(disk);
                }
            }
        }
        let device = self.device.as_ref().ok();
        value["block_device"] = device.map_or(Value::Null, |(device, _)| device_json(device));
        value["disks"] = disks.into_iter().map(device_json).collect();
        value["disk_unknown"] = self.unknown().into();
    }

    fn csv(&self) -> String {
        let mut text = String::from(
            "file_offset,length,state,access,device,device_offset,disk,disk_name,disk_offset\n",
        );
        for extent in self.map.extents() {
            let runs = self.runs(extent);
            let access = self.access(extent).name();
            let state = extent.state.name();
            let mut line = |offset: u64, length: u64, place: Option<(u64, &Place)>| {
                let device = self.map.device();
                let length = if extent.end() == u64::MAX {
                    String::new()
                } else {
                    length.to_string()
                };
                let _ = write!(text, "{offset},{length},{state},{access},");
                let _ = match place {
                    None => write!(text, ",,,,"),
                    Some((at, place)) => match place.known() {
                        Some((disk, offset)) => {
                            let name = quoted(&disk.name);
                            write!(text, "{device},{at},{},{name},{offset}", disk.id)
                        }
                        None => write!(text, "{device},{at},,,"),
                    },
                };
                text.push('\n');
            };
            if runs.is_empty() {
                line(extent.offset, extent.length, None);
            }
            let start = extent.physical.unwrap_or(0);
            for run in &runs {
                let offset = extent.offset + (run.offset - start);
                line(offset, run.length, Some((run.offset, &run.place)));
            }
        }
        text.pop();
        text
    }

    /// A table of linear targets that shows the range as a device.
    fn dmsetup(&self, table_device: Option<&Path>) -> Result<String> {
        let (device, _) = self.known_device()?;
        let (name, size) = match table_device {
            Some(path) => other_device(path)?,
            None => (device.id.to_string(), device.size),
        };
        let mut table = String::new();
        let mut at = 0;
        for extent in self.map.extents() {
            let bytes = format!("bytes {} to {}", extent.offset, extent.end());
            let start = match (self.access(extent), extent.physical) {
                (RawAccess::ReadWrite, Some(start)) => start,
                _ => bail!(
                    "no table of {bytes}: they are {}, and what is read or written there would \
                     not be the file's\nhelp: make them stable: mapdirect prepare FILE",
                    extent.state
                ),
            };
            let whole = [start, extent.length]
                .into_iter()
                .all(|bytes| bytes.is_multiple_of(SECTOR));
            ensure!(whole, "no table of {bytes}: they are no whole sectors");
            let end = start.checked_add(extent.length);
            ensure!(
                end.is_some_and(|end| end <= size),
                "no table of {bytes}: they lie beyond the end of the device {name}"
            );
            let length = extent.length / SECTOR;
            let _ = writeln!(table, "{at} {length} linear {name} {}", start / SECTOR);
            at += length;
        }
        table.pop();
        Ok(table)
    }

    fn known_device(&self) -> Result<&(BlockDevice, DiskLayout)> {
        match &self.device {
            Ok(known) => Ok(known),
            Err(reason) => bail!("the device is not known: {}", printable(reason)),
        }
    }

    /// Where the first page of a swap file is, in pages: the kernel's parameter
    /// `resume_offset`.
    fn resume_offset(&self, file: Option<&File>) -> Result<String> {
        const NONE: &str = "no resume_offset";
        self.known_device().context(NONE)?;
        let page = page_size();
        for extent in self.map.extents() {
            // The kernel swaps to blocks that were never written as to others.
            let fit = matches!(extent.state, ExtentState::Written | ExtentState::Unwritten);
            ensure!(
                fit,
                "{NONE}: bytes {} to {} are {}, and swapon(8) refuses such a file\n\
                 help: make a new one: mapdirect prepare FILE --size SIZE --contiguous, mkswap FILE",
                extent.offset,
                extent.end(),
                extent.state
            );
        }
        let first = self.map.extents().first();
        let start = first.and_then(|extent| Some((extent.physical?, extent.length)));
        let (start, length) = start.context("no resume_offset: the file is empty")?;
        ensure!(
            start.is_multiple_of(page) && length >= page,
            "{NONE}: the first page of the file does not lie in one page of the device"
        );
        let mut magic = [0; 10];
        let read = file.map(|file| file.read_exact_at(&mut magic, page - 10));
        let is_swap = matches!(read, Some(Ok(()))) && magic == *b"SWAPSPACE2";
        ensure!(
            is_swap,
            "{NONE}: the file is no swap space for pages of {page} bytes\nhelp: mkswap FILE"
        );
        Ok((start / page).to_string())
    }
}

/// What may be done to blocks that a pin of some strength keeps in their place.
fn access_under(strength: Strength, state: ExtentState) -> RawAccess {
    match state.raw_access() {
        // Strength stable does not hold them.
        RawAccess::Read if strength == Strength::Stable => RawAccess::None,
        access => access,
    }
}

/// The numbers and the size of a device that shall be named in a table.
fn other_device(path: &Path) -> Result<(String, u64)> {
    let name = printable(&path.to_string_lossy());
    let metadata = std::fs::metadata(path).with_context(|| format!("cannot examine {name}"))?;
    ensure!(
        metadata.file_type().is_block_device(),
        "{name} is no block device"
    );
    let number = metadata.rdev();
    let id = mapdirect::DeviceId {
        major: rustix::fs::major(number),
        minor: rustix::fs::minor(number),
    };
    let device = BlockDevice::with_id(id)?;
    Ok((id.to_string(), device.size))
}

/// A field of CSV (RFC 4180).
fn quoted(text: &str) -> String {
    if text.contains([',', '"', '\n', '\r']) {
        format!("\"{}\"", text.replace('"', "\"\""))
    } else {
        text.to_owned()
    }
}

fn device_json(device: &BlockDevice) -> Value {
    let path = |path: &Option<std::path::PathBuf>| {
        path.as_ref()
            .map(|path| path.to_string_lossy().into_owned())
    };
    json!({
        "device": device.id.to_string(),
        "name": device.name,
        "path": path(&device.path),
        "size": device.size,
        "backing_file": path(&device.backing_file),
    })
}

fn run_json(run: &DiskRun) -> Value {
    let known = run.place.known();
    json!({
        "device": known.map(|(disk, _)| disk.id.to_string()),
        "offset": known.map(|(_, offset)| offset),
        "length": run.length,
        "unknown": match &run.place {
            Place::Unknown { reason } => Some(reason),
            _ => None,
        },
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use mapdirect::DeviceId;

    const NOWHERE: DeviceId = DeviceId {
        major: 4095,
        minor: 7,
    };

    fn map(states: &[ExtentState]) -> BlockMap {
        let length = states.len() as u64 * 8192;
        let extents = states.iter().enumerate().map(|(at, state)| {
            let physical = (*state != ExtentState::Hole).then_some(1 << 20 | (at as u64) << 14);
            Extent::new(at as u64 * 8192, physical, 8192, *state)
        });
        BlockMap::new(NOWHERE, 4096, length, 0..length, extents)
    }

    #[test]
    fn a_device_that_is_not_there_is_said() {
        let map = map(&[ExtentState::Written, ExtentState::Hole]);
        let extents = Extents::pinned(&map, Strength::All);
        let mut value = json!({});
        extents.add_devices(&mut value);
        assert_eq!(value["block_device"], Value::Null);
        let reason = value["disk_unknown"].as_str().unwrap();
        assert!(reason.contains("4095:7"), "{reason}");
        assert_eq!(
            extents.csv().lines().skip(1).collect::<Vec<_>>(),
            ["0,8192,written,none,,,,,", "8192,8192,hole,none,,,,,"]
        );
        assert!(extents.dmsetup(None).is_err());
        assert!(extents.table().contains("cannot be known"));
    }

    #[test]
    fn what_is_not_held_is_not_to_be_read() {
        for (strength, readable) in [
            (Strength::All, &["written", "shared"][..]),
            (Strength::Stable, &["written"]),
        ] {
            let states: Vec<_> = ExtentState::ALL
                .iter()
                .filter(|state| access_under(strength, **state) != RawAccess::None)
                .map(|state| state.name())
                .collect();
            assert_eq!(states, readable);
        }
    }

    #[test]
    fn fields_are_quoted_where_that_is_needed() {
        assert_eq!(quoted("sda1"), "sda1");
        assert_eq!(quoted("a,\"b\"\n"), "\"a,\"\"b\"\"\n\"");
    }
}
