//! Brings the programs into the kernel and keeps them there. Their links and
//! maps are pinned in a directory of the bpf filesystem, where they outlive the
//! guard.

use super::abi::{DEAD, PAGE, SHARED_WORDS, Settings};
use super::attach::{attach, attach_one, link_name, try_each_kind};
use super::costly::{COSTLY, Costly, NOTES};
use super::directory::{empty, empty_but, enter, has_marker, remove};
use super::functions::Kernel;
use super::identity::ask_about;
use super::places;
use super::preempts;
use super::watch::Held;
use libbpf_rs::btf::types::{Func, FuncProto};
use libbpf_rs::{
    Btf, MapCore, MapFlags, MapHandle, Object, ObjectBuilder, PrintLevel, ProgramAttachType,
    ProgramType,
};
use mapdirect_sys::Errno;
use mapdirect_sys::mmap::page_size;
use mapdirect_sys::names::path_in_line;
use mapdirect_sys::shared_words::SharedWords;
use rustix::fs::Mode;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use zerocopy::{FromBytes, IntoBytes};

/// The programs, compiled from `prog/mapdirect.bpf.c` by `cargo xtask bpf`.
pub(super) const OBJECT: &[u8] = include_bytes!("prog/mapdirect.bpf.o");
/// The version of the programs: the fingerprint of the object.
const HASH: &str = include_str!("prog/mapdirect.bpf.hash");

/// The maps that user space uses.
pub(super) const BPF_MAPS: [&str; 13] = [
    "settings",
    "filter",
    "entries",
    "spill",
    "roots",
    "holders",
    "lives",
    "devices",
    "events",
    "changes",
    "identities",
    "pins",
    "refused",
];

/// Why the gate could not be loaded.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LoadError {
    /// The process lacks privileges.
    #[error("loading BPF programs needs root")]
    NotPrivileged,
    /// The kernel lacks something that the gate needs.
    #[error("this kernel cannot do it: {0}")]
    Unsupported(String),
    /// The kernel has everything, but may leave programs out: it preempts them,
    /// and no security hook calls them.
    #[error(
        "not supported here: this kernel preempts BPF programs, and then leaves some out that no \
         security hook calls"
    )]
    MayLeaveOut,
    /// The kernel's page size is not the one that the programs are built for.
    #[error(
        "not supported here: its programs are for pages of {PAGE} bytes, and this kernel has pages of {0}"
    )]
    PageSize(u64),
    /// Another guard has the directory.
    #[error("another guard keeps the gate at {0}; end it first")]
    AlreadyRunning(String),
    /// A guard of another version left the gate.
    #[error(
        "the gate at {0} was made by another version; end its pins, then run \
         `mapdirect guard --unload`"
    )]
    OtherVersion(String),
    /// The kernel takes the programs, and cannot attach them.
    #[error("not supported here: this kernel loads BPF programs and cannot attach them to {0}")]
    CannotAttach(&'static str),
    /// A system call or another step failed.
    #[error("{0}")]
    Failed(String),
}

impl LoadError {
    /// Whether this kernel can never load the gate. A guard that may choose
    /// then takes the other gate.
    #[must_use]
    pub fn is_for_good(&self) -> bool {
        matches!(
            self,
            Self::Unsupported(_) | Self::MayLeaveOut | Self::PageSize(_) | Self::CannotAttach(_)
        )
    }

    /// What to do about it, if anything is known.
    #[must_use]
    pub fn help(&self) -> Option<String> {
        match self {
            Self::MayLeaveOut => {}
            Self::PageSize(_) => {
                return Some(format!(
                    "boot a kernel with pages of {PAGE} bytes, or use the fanotify gate"
                ));
            }
            Self::CannotAttach(_) => {
                let first = if cfg!(target_arch = "aarch64") {
                    "Linux 6.4 or later"
                } else {
                    "a kernel"
                };
                return Some(format!(
                    "boot {first} with CONFIG_DYNAMIC_FTRACE_WITH_DIRECT_CALLS, or use the \
                     fanotify gate (Linux 6.14 or later)"
                ));
            }
            _ => return None,
        }
        let modules = security_modules();
        let modules = modules.trim();
        let separator = if modules.is_empty() { "" } else { "," };
        Some(format!(
            "boot it with lsm={modules}{separator}bpf; or with preempt=voluntary, if it knows that"
        ))
    }
}

/// Refuses a machine on which the programs would round ranges wrongly.
fn require_page_size(size: u64) -> Result<(), LoadError> {
    if size == PAGE {
        Ok(())
    } else {
        Err(LoadError::PageSize(size))
    }
}

pub(super) fn failed(what: &str, error: impl std::fmt::Display) -> LoadError {
    LoadError::Failed(format!("{what}: {error}"))
}

/// The maps of a gate that is in place.
#[derive(Debug)]
pub(super) struct Maps {
    pub(super) settings: MapHandle,
    pub(super) filter: SharedWords,
    pub(super) entries: MapHandle,
    pub(super) spill: MapHandle,
    pub(super) roots: MapHandle,
    pub(super) holders: MapHandle,
    pub(super) lives: MapHandle,
    pub(super) devices: MapHandle,
    pub(super) events: MapHandle,
    pub(super) changes: MapHandle,
    pub(super) identities: MapHandle,
    pub(super) pins: MapHandle,
    pub(super) refused: MapHandle,
}

impl Maps {
    fn open(directory: &Path) -> Result<Self, LoadError> {
        let map = |name: &str| {
            MapHandle::from_pinned_path(directory.join(name)).map_err(|error| failed(name, error))
        };
        Ok(Self {
            settings: map("settings")?,
            filter: SharedWords::new(map("filter")?.as_fd(), SHARED_WORDS)
                .map_err(|errno| failed("mapping the filter", errno))?,
            entries: map("entries")?,
            spill: map("spill")?,
            roots: map("roots")?,
            holders: map("holders")?,
            lives: map("lives")?,
            devices: map("devices")?,
            events: map("events")?,
            changes: map("changes")?,
            identities: map("identities")?,
            pins: map("pins")?,
            refused: map("refused")?,
        })
    }
}

/// A gate in place, and the claim on it.
#[derive(Debug)]
pub(super) struct Loaded {
    pub(super) maps: Maps,
    pub(super) costly: Costly,
    /// Where XFS keeps what it has set aside for copies.
    pub(super) places: places::Known,
    pub(super) held: Arc<Held>,
    /// A lock on the directory: only one guard may have a gate.
    claim: OwnedFd,
    /// Whether the gate was there already, with pins.
    pub(super) adopted: bool,
    /// Whether the kernel's security hooks call the programs. If not, the
    /// programs are attached to functions.
    pub(super) hooked: bool,
    /// Whether the programs are told when an inode leaves memory.
    pub(super) hears_of_inodes: bool,
}

impl Loaded {
    pub(super) fn claim(&self) -> &OwnedFd {
        &self.claim
    }
}

/// Puts the gate in place, or takes over an existing one.
pub(super) fn load(directory: &Path) -> Result<Loaded, LoadError> {
    require_page_size(page_size())?;
    let (claim, mounted) = enter(directory)?;
    let complete = directory.join(marker());
    let in_use = has_marker(directory) && keeps_pins(directory, complete.exists());
    if in_use && !complete.exists() {
        return Err(LoadError::OtherVersion(path_in_line(directory)));
    }
    let object = if in_use {
        // The same programs, with the existing maps. They can restore missing
        // parts of the gate.
        load_object(Some(directory))?
    } else {
        // The earlier guard has pinned nothing, or did not complete its start.
        match replace(directory) {
            Ok(object) => {
                rustix::fs::mkdir(&complete, Mode::RWXU).map_err(|errno| failed("mkdir", errno))?;
                object
            }
            Err(error) => {
                // Remove everything if the gate does not work here.
                let _ = remove(directory);
                drop(claim);
                if mounted && let Some(parent) = directory.parent() {
                    let _ = rustix::mount::unmount(parent, rustix::mount::UnmountFlags::empty());
                }
                return Err(error);
            }
        }
    };
    let held = Held::new(directory, marker()).map_err(|errno| failed("holding the gate", errno))?;
    let held = Arc::new(held);
    Ok(Loaded {
        maps: Maps::open(directory)?,
        places: places::Known::of(&object),
        costly: Costly::new(object, directory, Arc::clone(&held)),
        held,
        claim,
        adopted: in_use,
        hooked: has_lsm(),
        hears_of_inodes: hears_of_inodes(),
    })
}

/// The directories in which a gate is put together before it replaces another.
/// The second one is used if a guard was killed in the middle of that.
const NEXT: [&str; 2] = ["next-0", "next-1"];

/// Puts the gate in place of an existing one that keeps no pin, if there is
/// one. The existing gate stays attached until the new one is attached.
/// Otherwise `mmap(2)` with `MAP_DIRECT` would be answered in between as if
/// there were no such flag.
fn replace(directory: &Path) -> Result<Object, LoadError> {
    let clearing = |error: std::io::Error| failed("clearing", error);
    let free = NEXT.iter().find(|name| !directory.join(name).exists());
    let next = directory.join(free.unwrap_or(&NEXT[0]));
    if free.is_none() {
        empty(&next).map_err(clearing)?;
    } else {
        rustix::fs::mkdir(&next, Mode::RWXU).map_err(|errno| failed("mkdir", errno))?;
    }
    let object = put_in_place(&next)?;
    empty_but(directory, Some(&next)).map_err(clearing)?;
    let moving = |error: std::io::Error| failed("moving", error);
    for entry in std::fs::read_dir(&next).map_err(moving)? {
        let name = entry.map_err(moving)?.file_name();
        std::fs::rename(next.join(&name), directory.join(&name)).map_err(moving)?;
    }
    std::fs::remove_dir(&next).map_err(clearing)?;
    Ok(object)
}

/// Whether an existing gate keeps any pin. `true` if that cannot be found out.
/// A guard that removes a gate begins with its links.
fn keeps_pins(directory: &Path, same_version: bool) -> bool {
    if !directory.join(link_name("file_free")).exists() {
        return false;
    }
    let Ok(lives) = MapHandle::from_pinned_path(directory.join("lives")) else {
        return true;
    };
    let is_any_kept = || lives.keys().any(|key| has_pins(&lives, &key));
    let Ok(pins) = MapHandle::from_pinned_path(directory.join("pins")) else {
        return true;
    };
    // A dormant pin may be taken up at any moment. The same programs can be
    // told that none may; programs of another version find nothing to take up.
    let over: Vec<Vec<u8>> = pins.keys().collect();
    if same_version && !over.is_empty() || is_any_kept() {
        return true;
    }
    for pin in over {
        let _ = pins.delete(&pin);
    }
    is_any_kept()
}

/// Whether the programs count pins of an inode, or somebody is just leaving or
/// joining. `true` if that cannot be found out.
pub(super) fn has_pins(lives: &MapHandle, key: &[u8]) -> bool {
    match lives.lookup(key, MapFlags::ANY) {
        Ok(None) => false,
        Ok(Some(bytes)) => {
            u64::read_from_prefix(&bytes).map_or(true, |(lives, _)| lives & DEAD == 0)
        }
        Err(_) => true,
    }
}

/// What the kernel offers, according to its own type information.
struct Offers<'btf> {
    btf: &'btf Btf<'static>,
    /// Whether the security hooks call BPF programs.
    lsm: bool,
}

impl Offers<'_> {
    fn function(&self, name: &str) -> Option<usize> {
        let function: Func<'_> = self.btf.type_by_name(name)?;
        let prototype = FuncProto::try_from(function.next_type()?).ok()?;
        Some(prototype.iter().len())
    }

    fn has(&self, name: &str) -> bool {
        self.function(name).is_some()
    }

    /// The function at which a hook is watched.
    fn hook(&self, name: &str) -> String {
        match name {
            _ if self.lsm => format!("bpf_lsm_{name}"),
            "file_free_security" => String::from("security_file_free"),
            "inode_free_security" => String::from("security_inode_free"),
            _ => format!("security_{name}"),
        }
    }
}

/// What to do with a program.
enum Choice {
    Load,
    /// Do not load the program: the kernel works without it.
    Leave,
    /// The program is needed, but its function does not exist.
    Missing(String),
}

/// Hooks that only later kernels have.
const LATER_HOOKS: [&str; 2] = ["inode_file_setattr", "file_ioctl_compat"];

fn choose(name: &str, section: &str, offers: &Offers<'_>) -> Choice {
    let needed = |function: &str| {
        if offers.has(function) {
            Choice::Load
        } else {
            Choice::Missing(function.to_owned())
        }
    };
    let when = |wanted: bool, otherwise: Choice| if wanted { otherwise } else { Choice::Leave };
    let three = offers.function(&offers.hook("inode_setattr")) == Some(3);
    let four = offers.function(&offers.hook("inode_rename")) == Some(4);
    let inlined = !offers.has("remap_verify_area");
    match name {
        "inode_setattr" => when(three, needed(&offers.hook("inode_setattr"))),
        "inode_setattr_2" => when(!three, needed(&offers.hook("inode_setattr"))),
        "inode_rename" => when(four, needed(&offers.hook("inode_rename"))),
        "inode_rename_5" => when(!four, needed(&offers.hook("inode_rename"))),
        // Without this program nothing is taken up again.
        "inode_free" => when(
            offers.has(&offers.hook("inode_free_security")),
            Choice::Load,
        ),
        "mmap_file" => when(offers.lsm, needed("bpf_lsm_mmap_file")),
        "mmap_file_3" => when(!offers.lsm, needed("security_mmap_file")),
        "note_remap" => when(!inlined, Choice::Load),
        "end_remap" => when(!inlined, Choice::Load),
        "note_clone" | "note_dedupe" | "note_dedupe_one" | "end_clone" | "end_dedupe_one" => when(
            inlined,
            needed(section.rsplit('/').next().unwrap_or_default()),
        ),
        _ => match section.split_once('/') {
            Some(("lsm", hook)) if LATER_HOOKS.contains(&hook) => {
                when(offers.has(&offers.hook(hook)), Choice::Load)
            }
            Some(("lsm", hook)) => needed(&offers.hook(hook)),
            Some(("fentry" | "fexit", function)) => needed(function),
            _ => Choice::Load,
        },
    }
}

/// The kernel's security modules, as the parameter `lsm=` takes them.
fn security_modules() -> String {
    std::fs::read_to_string("/sys/kernel/security/lsm").unwrap_or_default()
}

/// Whether the security hooks call BPF programs.
fn has_lsm() -> bool {
    let modules = security_modules();
    modules.trim().split(',').any(|name| name == "bpf")
}

/// Whether the hooks that call programs include one for inodes that leave
/// memory.
fn hears_of_inodes() -> bool {
    let is_there = |btf: Btf<'static>| {
        let function: Option<Func<'_>> = btf.type_by_name("bpf_lsm_inode_free_security");
        function.is_some()
    };
    has_lsm() && Btf::from_vmlinux().is_ok_and(is_there)
}

/// The last messages of libbpf: reasons are long, and come line by line.
static SAID: Mutex<String> = Mutex::new(String::new());

fn listen(_level: PrintLevel, line: String) {
    let mut said = SAID.lock().unwrap_or_else(PoisonError::into_inner);
    said.push_str(&line);
    // The end of the text tells most.
    const MOST: usize = 4000;
    if said.len() > MOST {
        let mut from = said.len() - MOST;
        while !said.is_char_boundary(from) {
            from += 1;
        }
        said.drain(..from);
    }
}

/// Whether this process may load programs that look at the kernel. Root may
/// have given that right away.
fn is_privileged() -> bool {
    use mapdirect_sys::capget::{CAP_SYS_ADMIN, contains, effective};
    effective(0).is_ok_and(|has| contains(has, CAP_SYS_ADMIN))
}

/// An error of libbpf together with its messages.
pub(super) fn told(what: &str, error: &libbpf_rs::Error) -> LoadError {
    // The verifier also answers EACCES.
    let denied = error.kind() == libbpf_rs::ErrorKind::PermissionDenied;
    if denied && !is_privileged() {
        return LoadError::NotPrivileged;
    }
    let said = std::mem::take(&mut *SAID.lock().unwrap_or_else(PoisonError::into_inner));
    LoadError::Unsupported(format!("{what}: {error:#}\n{}", said.trim_end()))
}

/// Loads the programs, attaches all but the costly ones, and pins links and
/// maps.
fn put_in_place(directory: &Path) -> Result<Object, LoadError> {
    let object = load_object(None)?;
    for mut map in object_maps(&object) {
        let path = directory.join(&map.0);
        map.1
            .pin(&path)
            .map_err(|error| told("pinning a map", &error))?;
    }
    // Attach the programs that note first: a hook that finds no notes knows
    // less.
    let mut programs: Vec<_> = object
        .progs_mut()
        .filter(|program| {
            let is_attached_when_asked = program.section().to_string_lossy().starts_with("iter/");
            program.autoload()
                && program.prog_type() != ProgramType::Syscall
                && !is_attached_when_asked
        })
        .map(|program| {
            let hook = program.section().to_string_lossy().starts_with("lsm/");
            (hook, program.name().to_string_lossy().into_owned())
        })
        .collect();
    programs.sort();
    let names = programs.iter().map(|(_, name)| name.as_str());
    let names: Vec<&str> = names
        .filter(|name| !COSTLY.contains(name) && !NOTES.contains(name))
        .collect();
    attach(&object, directory, &names)?;
    Ok(object)
}

fn marker() -> String {
    format!("version-{}", HASH.trim().get(..16).unwrap_or("none"))
}

fn object_maps(object: &Object) -> Vec<(String, MapHandle)> {
    object
        .maps()
        .filter_map(|map| {
            let name = pinned_name(map.name().to_str()?);
            BPF_MAPS.contains(&name).then_some(())?;
            Some((name.to_owned(), MapHandle::try_from(&map).ok()?))
        })
        .collect()
}

/// The name by which a map is pinned. libbpf names the map of global variables
/// after its section, and the bpf filesystem does not permit a dot in a name.
fn pinned_name(name: &str) -> &str {
    if name.contains(".bss") {
        "filter"
    } else {
        name
    }
}

/// Loads the programs. If a directory is given, they use the maps that are
/// pinned in it.
pub(super) fn load_object(maps: Option<&Path>) -> Result<Object, LoadError> {
    libbpf_rs::set_print(Some((PrintLevel::Warn, listen)));
    let btf = Btf::from_vmlinux()
        .map_err(|error| LoadError::Unsupported(format!("it has no type information: {error}")))?;
    let offers = Offers {
        btf: &btf,
        lsm: has_lsm(),
    };
    let mut open = ObjectBuilder::default()
        .open_memory(OBJECT)
        .map_err(|error| told("reading the programs", &error))?;
    for mut program in open.progs_mut() {
        let name = program.name().to_string_lossy().into_owned();
        let section = program.section().to_string_lossy().into_owned();
        match choose(&name, &section, &offers) {
            Choice::Load => {}
            Choice::Leave => {
                program.set_autoload(false);
                continue;
            }
            Choice::Missing(function) => {
                return Err(LoadError::Unsupported(format!("it has no {function}")));
            }
        }
        if let Some(hook) = section.strip_prefix("lsm/")
            && !offers.lsm
        {
            // Without security hooks, the programs attach to the functions that
            // would call them: they change the answers of functions that can
            // refuse, and watch functions that only report.
            let (attach_type, function) = match hook {
                "file_free_security" => (ProgramAttachType::TraceFentry, "security_file_free"),
                "inode_free_security" => (ProgramAttachType::TraceFentry, "security_inode_free"),
                _ => (
                    ProgramAttachType::ModifyReturn,
                    &*format!("security_{hook}"),
                ),
            };
            program.set_prog_type(ProgramType::Tracing);
            program.set_attach_type(attach_type);
            program
                .set_attach_target(0, Some(function.to_owned()))
                .map_err(|error| told("choosing a place", &error))?;
        }
    }
    if let Some(directory) = maps {
        for mut map in open.maps_mut() {
            let name = pinned_name(map.name().to_str().unwrap_or_default()).to_owned();
            if BPF_MAPS.contains(&name.as_str()) {
                map.reuse_pinned_map(directory.join(&name))
                    .map_err(|error| told("taking over a map", &error))?;
            }
        }
    }
    open.load().map_err(|error| told("loading", &error))
}

/// Checks whether the gate can be loaded here, and its programs attached: one of
/// each kind is, for a moment.
///
/// # Errors
///
/// Why it cannot be loaded.
pub fn probe() -> Result<(), LoadError> {
    require_page_size(page_size())?;
    let object = load_object(None)?;
    try_each_kind(&object)?;
    if has_lsm() {
        return Ok(());
    }
    let kernel = Kernel::read()?;
    let mode = if kernel.preemption == 0 {
        0
    } else {
        preemption_mode(&object, &kernel)?
    };
    if preempts(&kernel, mode) {
        return Err(LoadError::MayLeaveOut);
    }
    Ok(())
}

/// Asks the one program that tells the mode, attached for a moment. It judges
/// by maps of its own, in which nothing is pinned.
fn preemption_mode(object: &Object, kernel: &Kernel) -> Result<i32, LoadError> {
    const TELLS: &str = "file_fcntl";
    let map = |name: &str| {
        let found = object.maps().find(|map| map.name() == name);
        let found = found.ok_or_else(|| failed("finding a map", name))?;
        MapHandle::try_from(&found).map_err(|error| failed(name, error))
    };
    let settings = Settings::new(std::process::id(), kernel, true, false);
    map("settings")?
        .update(&0u32.to_ne_bytes(), settings.as_bytes(), MapFlags::ANY)
        .map_err(|error| failed("writing the rules", error))?;
    let program = object.progs_mut().find(|program| program.name() == TELLS);
    let program = program.ok_or_else(|| failed("attaching", TELLS))?;
    let _link = attach_one(&program)?;
    let probe = mapdirect_sys::memfd::sealed("mapdirect-probe", b"")
        .map_err(|errno| failed("memfd_create", errno))?;
    match ask_about(&map("identities")?, probe.as_fd(), None) {
        Ok(answered) => Ok(answered.preemption),
        // The program has just been left out.
        Err(Errno::NODATA) => Err(LoadError::MayLeaveOut),
        Err(errno) => Err(failed("asking the programs", errno)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use mapdirect_testkit::fingerprint::fingerprint;

    #[test]
    fn the_version_is_that_of_the_object() {
        assert_eq!(HASH.trim(), fingerprint(OBJECT), "run `cargo xtask bpf`");
    }

    #[test]
    fn other_sizes_of_a_page_are_refused_with_a_reason() {
        assert!(require_page_size(4096).is_ok());
        for size in [16 << 10, 64 << 10] {
            let error = require_page_size(size).unwrap_err();
            let said = error.to_string();
            assert!(said.contains("pages of 4096 bytes"), "{said}");
            assert!(said.ends_with(&format!("pages of {size}")), "{said}");
            assert!(error.is_for_good());
            assert!(
                error
                    .help()
                    .is_some_and(|help| help.contains("fanotify gate"))
            );
        }
    }
}
