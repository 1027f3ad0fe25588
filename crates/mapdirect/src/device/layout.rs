//! Where the bytes of a device are on whole disks.

use super::BlockDevice;
use super::tree::{Below, Tree};
use mapdirect_model::{DeviceId, Extent};
use mapdirect_sys::Errno;
use mapdirect_sys::dm_table::Target;
use std::ops::Range;
use std::sync::Arc;

/// The most layers of devices above a disk that are looked through.
const LAYERS: u32 = 16;

/// Where bytes of a block device are.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Place {
    /// On a device that lies on no other.
    Disk {
        /// The whole disk.
        disk: Arc<BlockDevice>,
        /// Offset on it, in bytes.
        offset: u64,
    },
    /// It cannot be known.
    Unknown {
        /// Why, in words.
        reason: String,
    },
}

impl Place {
    fn unknown(reason: impl Into<String>) -> Self {
        Self::Unknown {
            reason: reason.into(),
        }
    }

    /// The disk and the offset on it in bytes, if they are known.
    #[must_use]
    pub fn known(&self) -> Option<(&BlockDevice, u64)> {
        match self {
            Self::Disk { disk, offset } => Some((disk, *offset)),
            Self::Unknown { .. } => None,
        }
    }

    /// The place that lies `bytes` behind.
    fn behind(&self, bytes: u64) -> Self {
        match self {
            Self::Disk { disk, offset } => Self::Disk {
                disk: Arc::clone(disk),
                offset: offset.saturating_add(bytes),
            },
            Self::Unknown { .. } => self.clone(),
        }
    }
}

/// A run of bytes of a block device that lie in one piece.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub struct DiskRun {
    /// Offset on the block device, in bytes.
    pub offset: u64,
    /// Length in bytes.
    pub length: u64,
    /// Where the bytes are.
    pub place: Place,
}

impl DiskRun {
    pub(super) fn end(&self) -> u64 {
        self.offset.saturating_add(self.length)
    }
}

/// Where all bytes of a block device are on whole disks, as it was when this was
/// read; see [`BlockDevice::layout`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DiskLayout {
    /// In order, from the first byte of the device to its last.
    runs: Vec<DiskRun>,
}

/// Reads the table of a mapped device of these numbers.
type ReadTable = fn(u32, u32) -> Result<Vec<Target>, Errno>;

impl DiskLayout {
    pub(super) fn read(tree: &Tree, device: &BlockDevice, table: ReadTable) -> Self {
        let reader = Reader { tree, table };
        let mut runs = Vec::new();
        reader.locate(device.id, 0..device.size, 0, LAYERS, &mut runs);
        Self { runs }
    }

    /// All of it, in the order of offsets on the device.
    #[must_use]
    pub fn runs(&self) -> &[DiskRun] {
        &self.runs
    }

    /// Where a range of the device is, in bytes: in runs that cover all of it,
    /// in order.
    #[must_use]
    pub fn locate(&self, range: Range<u64>) -> Vec<DiskRun> {
        let first = self.runs.partition_point(|run| run.end() <= range.start);
        let mut found = Vec::new();
        let mut at = range.start;
        for run in &self.runs[first..] {
            let end = run.end().min(range.end);
            if at >= end {
                break;
            }
            found.push(DiskRun {
                offset: at,
                length: end - at,
                place: run.place.behind(at - run.offset),
            });
            at = end;
        }
        if at < range.end {
            found.push(DiskRun {
                offset: at,
                length: range.end - at,
                place: Place::unknown("it lies beyond the end of the device"),
            });
        }
        found
    }

    /// Where an extent is; nothing if it has no blocks.
    #[must_use]
    pub fn locate_extent(&self, extent: &Extent) -> Vec<DiskRun> {
        let Some(start) = extent.physical else {
            return Vec::new();
        };
        self.locate(start..start.saturating_add(extent.length))
    }
}

struct Reader<'tree> {
    tree: &'tree Tree,
    table: ReadTable,
}

impl Reader<'_> {
    /// Appends where `range` of a device is, which lies at `offset` of the one
    /// that was asked about.
    fn locate(
        &self,
        id: DeviceId,
        range: Range<u64>,
        offset: u64,
        layers: u32,
        runs: &mut Vec<DiskRun>,
    ) {
        if let Err(reason) = self.try_locate(id, &range, offset, layers, runs) {
            push(
                runs,
                DiskRun {
                    offset,
                    length: range.end - range.start,
                    place: Place::unknown(reason),
                },
            );
        }
    }

    /// Appends nothing if it fails, and says why.
    fn try_locate(
        &self,
        id: DeviceId,
        range: &Range<u64>,
        offset: u64,
        layers: u32,
        runs: &mut Vec<DiskRun>,
    ) -> Result<(), String> {
        let said = |error: crate::Error| error.obstacle().to_owned();
        let device = self.tree.device(id).map_err(said)?;
        if range.end > device.size {
            return Err(format!(
                "sysfs contradicts itself: {} ends at byte {}, before byte {}",
                device.name, device.size, range.end
            ));
        }
        let layers = layers
            .checked_sub(1)
            .ok_or_else(|| format!("more than {LAYERS} devices lie on each other"))?;
        match self.tree.below(id).map_err(said)? {
            Below::Nothing => {
                let run = DiskRun {
                    offset,
                    length: range.end - range.start,
                    place: Place::Disk {
                        offset: range.start,
                        disk: Arc::new(device),
                    },
                };
                push(runs, run);
            }
            Below::Disk(disk, start) => {
                let ahead = |at: u64| {
                    at.checked_add(start)
                        .ok_or_else(|| format!("sysfs has {} end nowhere", device.name))
                };
                let range = ahead(range.start)?..ahead(range.end)?;
                self.locate(disk, range, offset, layers, runs);
            }
            Below::Mapped => self.through_table(&device, range, offset, layers, runs)?,
            Below::Others(others) => {
                return Err(format!(
                    "{} is made of {} in a way that only its driver knows",
                    device.name,
                    others.join(", ")
                ));
            }
        }
        Ok(())
    }

    fn through_table(
        &self,
        device: &BlockDevice,
        range: &Range<u64>,
        offset: u64,
        layers: u32,
        runs: &mut Vec<DiskRun>,
    ) -> Result<(), String> {
        let name = &device.name;
        let targets = (self.table)(device.id.major, device.id.minor).map_err(|errno| {
            let help = match errno {
                Errno::ACCESS | Errno::PERM => " (it takes CAP_SYS_ADMIN)",
                _ => "",
            };
            format!("the table of the mapped device {name} cannot be read: {errno}{help}")
        })?;
        // All of the range, without gaps, or nothing of it.
        let mut at = range.start;
        let mut parts = Vec::new();
        for target in &targets {
            let end = target.start.checked_add(target.length);
            let end = end.ok_or_else(|| format!("the table of {name} makes no sense"))?;
            if (target.start..end).contains(&at) && at < range.end {
                let next = end.min(range.end);
                parts.push((target, at..next));
                at = next;
            }
        }
        if at < range.end {
            return Err(format!("the table of {name} ends at byte {at}"));
        }
        for (target, part) in parts {
            let offset = offset + (part.start - range.start);
            let length = part.end - part.start;
            match target.linear() {
                Some((major, minor, start)) => {
                    let start = start.saturating_add(part.start - target.start);
                    let below = start..start.saturating_add(length);
                    self.locate(DeviceId { major, minor }, below, offset, layers, runs);
                }
                None => push(
                    runs,
                    DiskRun {
                        offset,
                        length,
                        place: Place::unknown(format!(
                            "{name} maps it by the device-mapper's target {}, not linearly",
                            target.kind
                        )),
                    },
                ),
            }
        }
        Ok(())
    }
}

/// Appends a run, and joins it with the one in front if that goes on in it.
fn push(runs: &mut Vec<DiskRun>, run: DiskRun) {
    if run.length == 0 {
        return;
    }
    if let Some(last) = runs.last_mut()
        && last.end() == run.offset
        && last.place.behind(last.length) == run.place
    {
        last.length += run.length;
        return;
    }
    runs.push(run);
}
