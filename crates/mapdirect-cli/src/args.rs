//! The command line.

use crate::columns::{ShowColumn, StatusColumn};
use crate::since::{Since, parse_since};
use crate::size::{ByteRange, parse_range, parse_size};
use clap::{Args, Parser, Subcommand, ValueEnum};
use std::ffi::OsString;
use std::path::PathBuf;

const AFTER: &str = "\
Environment:
  MAPDIRECT_SOCKET   where the guard listens (default: /run/mapdirect/guard.sock)
  MAPDIRECT_CACHED   1 lets programs map files without DAX, through the page cache
  COLUMNS            how wide text may be; else the terminal says, or it is 80
  NO_COLOR           no colours, on a terminal either
Where the locale (LC_ALL, LC_CTYPE, LANG) has no UTF-8, all but JSON is ASCII.";

/// Keep the blocks of files where they are.
///
/// While a range of a file is pinned or mapped MAP_DIRECT, nobody can move,
/// free, share or allocate the blocks under it: whoever tries gets ETXTBSY.
#[derive(Debug, Parser)]
#[command(name = "mapdirect", version, after_help = AFTER)]
pub struct Mapdirect {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// The verbs.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Run the guard in the foreground until SIGTERM or SIGINT
    ///
    /// Needs root, in the initial PID namespace. Prints one line when it is
    /// ready, and a line to stderr for every operation it refuses. Anybody may
    /// connect to its socket; each request is judged by the credentials of the
    /// process that makes it. There is one guard per machine as a rule; several
    /// may run on sockets of their own.
    ///
    /// It is two processes: a supervisor, and the guard itself, which is started
    /// again when it ends. No pin ends by that. When the supervisor ends, so do
    /// pins under the fanotify gate, and holders are told; systemd keeps them for
    /// the next one.
    ///
    /// It says that it is ready only when it can keep pins; else it ends with
    /// status 1 and says what is missing. Of capabilities it needs CAP_SYS_ADMIN,
    /// CAP_SYS_PTRACE, CAP_DAC_OVERRIDE and CAP_SETUID, all in the initial user
    /// namespace; with the fanotify gate also CAP_LEASE, with the bpf gate also
    /// CAP_DAC_READ_SEARCH and CAP_SYSLOG.
    ///
    /// SIGHUP has it read its policy (mapdirect-policy(5)) and the file of pins to
    /// take (mapdirect-pins(5)) again, and say what came of it: a file with a
    /// mistake changes nothing. Other pins stay in any case.
    /// SIGQUIT, SIGUSR1 and SIGUSR2 do nothing. Whoever is to pin by the policy
    /// needs a guard that has CAP_SETGID, too.
    ///
    /// A user other than root has a limited number of connections, and all of
    /// them together leave places for root. Whoever finds none is told so
    /// (EAGAIN).
    Guard(GuardArgs),
    /// Pin a range of files, without mapping it, and print its extents
    ///
    /// While the pin is held nobody can move, free, share or allocate the
    /// blocks of the range: the extents printed stay true. It needs no DAX. Of
    /// several files all are pinned, or none; with --json there is a line for
    /// each.
    ///
    /// Under the bpf gate the pin stays when the guard goes away: this says so,
    /// once, and once more when a guard is back. When the pin is lost (under
    /// the fanotify gate with the guard, under the bpf gate with the gate) or
    /// broken (its blocks have changed by a way that no gate refuses), this says
    /// so and ends, with a status of its own. What becomes of COMMAND then is
    /// said by --on-loss; the status is such a one when it has ended.
    Pin(PinArgs),
    /// Have every block of a file allocated, written, and shared with nobody
    ///
    /// So that all of it can be pinned and mapped. Not a byte of the file
    /// changes; others may read and write it meanwhile. Needs no guard and no
    /// privilege but to write to the file. If there is too little space nothing
    /// is touched; if it runs out all the same, what was allocated is given back,
    /// unless somebody else has the file open. Interrupted, it leaves the file
    /// as far as it got: run it again to go on.
    Prepare(PrepareArgs),
    /// Run a program, and pin the files that it maps
    ///
    /// Any program, as it is: static, 32-bit, Go, Java. A seccomp filter has
    /// the kernel ask about shared mappings of files, and about nothing else.
    /// What COMMAND or a descendant maps of a file that is wanted is pinned
    /// before the mapping is there. Nobody can take it away from under the
    /// mapping then, and it stays pinned until the program has unmapped and
    /// closed the file.
    ///
    /// Without --files every file is wanted but those below /usr, /lib*, /bin,
    /// /sbin, /etc, /proc and /sys, and Java's hsperfdata. What cannot be
    /// pinned is said on stderr, once for each file and reason, and is mapped
    /// all the same; with --strict the call fails with ETXTBSY.
    ///
    /// Needs what any pin needs. COMMAND gains no privileges by set-user-ID
    /// programs (no_new_privs), unless root says --keep-privileges. There is
    /// one such filter to each program: `run` within `run`, and programs that
    /// install a listener of their own, are told so (EBUSY).
    Run(RunArgs),
    /// Draw the block map of files
    ///
    /// With totals by state, the ranges that are pinned, and whether the file
    /// could be mapped MAP_DIRECT here and if not why: because it is swap space,
    /// a loop device writes to it, or an overlay does. What was written and is
    /// only in memory yet counts as what a pin makes of it. Needs no privilege
    /// but to read the file.
    Show(ShowArgs),
    /// What the guard is doing: pins, holders, refusals
    ///
    /// The gate in force, the files with pins and who maps or opens them, how
    /// often which operation was refused, the last refusals, and breaches: pins
    /// whose blocks have changed all the same. Others than root see details of
    /// their own pins only. Of files that are named it says whether they are
    /// pinned, by its exit status, too.
    Status(StatusArgs),
    /// Pins, holders, refusals and block maps on one screen
    ///
    /// The files with pins, how many operations are refused in a second, the
    /// block map of the selected file, and the last refusals and breaches. Needs
    /// a terminal; 80 columns and 24 lines are enough. `?` shows the keys. When
    /// the guard goes away this says so, and goes on when one is back.
    Top(TopArgs),
    /// Refusals and breaches as they happen
    ///
    /// A line for each: when, what was refused, of which file under its present
    /// name, by whom, which pin it met and who holds that. It goes on until
    /// SIGINT. A guard that goes away is said, and the next one is watched. What
    /// comes too fast is told as a number: nothing ever waits for a reader.
    /// Others than root see what concerns files that they have pinned, and which
    /// program another user ran is not for them to know.
    Watch(WatchArgs),
    /// The latest refusals and breaches
    ///
    /// The guard keeps the last 4,096 records in memory, for as long as it runs.
    /// With systemd they are in the journal, too, with a field for each fact:
    /// journalctl MAPDIRECT_PIN=7.
    Log(LogArgs),
    /// What this machine offers, what is missing, and how to mend it
    ///
    /// Says what to do first; then kernel, gates, capabilities, the guard, what
    /// becomes of pins without one, DAX, filesystems, and what each gate cannot
    /// refuse. Runs for everybody; what only root can find out says so. Ends
    /// with status 1 if files cannot be pinned here.
    Doctor(DoctorArgs),
    /// Let somebody without CAP_LINUX_IMMUTABLE pin a file for a while
    ///
    /// The permission is for the file itself, whatever its name becomes, and is
    /// kept by the guard alone. Whoever uses it must be able to open the file.
    /// Pins that were granted stay when the time is over. `mapdirect status` shows
    /// what is armed. What is to last belongs into the policy:
    /// mapdirect-policy(5).
    Arm(ArmArgs),
    /// Take back what `arm` has permitted for a file
    ///
    /// Pins that were granted stay; `mapdirect unpin` ends them.
    Disarm(DisarmArgs),
    /// End a pin, whoever holds it
    ///
    /// Its holder is told that the pin is lost. What the holder maps stays mapped,
    /// and from then on anybody may change the blocks under it.
    Unpin(UnpinArgs),
    /// What the policy of the guard says, and whom it would let pin a file
    ///
    /// `policy check` reads the policy as the guard does and says what is wrong
    /// with it, or what it allows. With --as and a file, it says whether that user
    /// may pin the file, and by which rule; what is armed is not considered. Only
    /// root can tell whether the user may open the file.
    Policy(PolicyArgs),
}

/// Which gate to use.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum GateChoice {
    /// The best one this kernel has
    Auto,
    /// Permission events: Linux 6.14 and later; excludes writers
    Fanotify,
    /// Programs in the kernel: Linux 6.1 and later; judges every operation, and stays when the
    /// guard dies
    Bpf,
}

/// Forms of the extents of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Format {
    /// A table for people
    Table,
    /// JSON: docs/schemas has what is in it
    Json,
    /// A table of linear targets for dmsetup(8), in sectors of 512 bytes; only of what is stable
    Dmsetup,
    /// The page where a swap file begins on its device, for the kernel's resume_offset=
    ResumeOffset,
    /// A line for each run of bytes, with a heading (RFC 4180)
    Csv,
}

/// Forms of the extents of a pin. A pinned file cannot be swap space.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum PinFormat {
    /// A table for people
    Table,
    /// JSON: docs/schemas has what is in it
    Json,
    /// A table of linear targets for dmsetup(8), in sectors of 512 bytes; only of what is stable
    Dmsetup,
    /// A line for each run of bytes, with a heading (RFC 4180)
    Csv,
}

impl From<PinFormat> for Format {
    fn from(format: PinFormat) -> Self {
        match format {
            PinFormat::Table => Self::Table,
            PinFormat::Json => Self::Json,
            PinFormat::Dmsetup => Self::Dmsetup,
            PinFormat::Csv => Self::Csv,
        }
    }
}

/// How much a pin covers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum ScopeChoice {
    /// The range, rounded out to blocks
    Range,
    /// The whole file, its size included
    File,
}

/// What a pin holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum StrengthChoice {
    /// Everything: what is stable stays where it is, and the rest as it is
    All,
    /// What is stable or becomes so: holes may be filled, and the file may grow
    Stable,
}

impl From<StrengthChoice> for mapdirect::Strength {
    fn from(choice: StrengthChoice) -> Self {
        match choice {
            StrengthChoice::All => Self::All,
            StrengthChoice::Stable => Self::Stable,
        }
    }
}

/// What a program may do to its own files.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum OwnChoice {
    /// Shorten them and punch holes into them, where nobody else has pinned them; at that moment
    /// nobody else is refused there, either
    Allow,
    /// Nothing that others may not do
    Refuse,
}

/// Arguments of `guard`.
#[derive(Debug, Args)]
pub struct GuardArgs {
    /// Where to listen
    #[arg(long, value_name = "PATH", env = "MAPDIRECT_SOCKET", hide_env_values = true,
          default_value = mapdirect_proto::DEFAULT_SOCKET)]
    pub socket: PathBuf,
    /// What refuses operations that would break a pin
    #[arg(long, value_enum, default_value = "auto")]
    pub gate: GateChoice,
    /// Where the bpf gate is pinned: a directory of a bpf filesystem
    #[arg(
        long,
        value_name = "PATH",
        env = "MAPDIRECT_BPF_DIRECTORY",
        hide_env_values = true,
        default_value = "/sys/fs/bpf/mapdirect"
    )]
    pub bpf_directory: PathBuf,
    /// Take away a bpf gate that a guard has left behind, and with it the pins it keeps, and end
    #[arg(long)]
    pub unload: bool,
    /// Who may pin without CAP_LINUX_IMMUTABLE: this file, and the directory beside it whose
    /// name ends in .d
    #[arg(long, value_name = "PATH", default_value = mapdirect_guard::DEFAULT_POLICY)]
    pub policy: PathBuf,
    /// Pins to take at the start, and when this is told to read it again: mapdirect-pins(5)
    #[arg(long, value_name = "PATH", default_value = mapdirect_guard::DEFAULT_PINS)]
    pub pins: PathBuf,
    /// Do not print refusals
    #[arg(long, short)]
    pub quiet: bool,
}

/// Arguments of `arm`.
#[derive(Debug, Args)]
#[command(after_help = "\
Sizes take K, M, G and T, powers of 1024. The range is rounded out to blocks.")]
pub struct ArmArgs {
    /// The file
    pub file: PathBuf,
    /// The user who may pin it, by number or name
    #[arg(long, value_name = "USER", required_unless_present = "allow_gid")]
    pub allow_uid: Option<String>,
    /// The group whose members may pin it, by number or name
    #[arg(long, value_name = "GROUP", conflicts_with = "allow_uid")]
    pub allow_gid: Option<String>,
    /// Bytes that may be pinned, as in 1M:2M; OFFSET: goes on without end [default: all]
    #[arg(long, value_name = "OFFSET:LENGTH", value_parser = parse_range)]
    pub range: Option<ByteRange>,
    /// For how long, at most 86400
    #[arg(long, value_name = "N", default_value = "60")]
    pub seconds: u32,
}

/// Arguments of `disarm`.
#[derive(Debug, Args)]
pub struct DisarmArgs {
    /// The file
    pub file: PathBuf,
}

/// Arguments of `unpin`.
#[derive(Debug, Args)]
pub struct UnpinArgs {
    /// The number of the pin, as `mapdirect status` shows it
    #[arg(value_parser = pin_number)]
    pub id: u64,
}

fn pin_number(text: &str) -> Result<u64, String> {
    text.parse().map_err(|_| {
        String::from("a pin goes by its number, which `mapdirect status FILE` shows, not by a name")
    })
}

/// What to do with a policy.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum PolicyVerb {
    /// Read it and say what it says
    Check,
}

/// Arguments of `policy`.
#[derive(Debug, Args)]
pub struct PolicyArgs {
    /// What to do
    #[arg(value_enum)]
    pub verb: PolicyVerb,
    /// A file that somebody is to pin
    #[arg(requires = "as_user")]
    pub file: Option<PathBuf>,
    /// The user who is to pin it, by number or name
    #[arg(long = "as", value_name = "USER", requires = "file")]
    pub as_user: Option<String>,
    /// By a descriptor that can only read
    #[arg(long, requires = "file")]
    pub read_only: bool,
    /// The policy
    #[arg(long, value_name = "PATH", default_value = mapdirect_guard::DEFAULT_POLICY)]
    pub policy: PathBuf,
}

/// What a pin denies beside what would break it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Denial {
    /// Opening the files for writing, by anybody but this command and COMMAND with its descendants
    Write,
    /// Removing, renaming or replacing a name of the files, by anybody (fanotify gate: noticed)
    Rename,
}

/// What to do with COMMAND when its promise is over.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum OnLoss {
    /// End COMMAND and its descendants: SIGTERM, and SIGKILL five seconds later
    Kill,
    /// Say so on stderr, and let COMMAND run
    Warn,
    /// Let COMMAND run, and end as it does
    Ignore,
}

/// Arguments of `pin`.
#[derive(Debug, Args)]
#[command(after_help = "\
Sizes take K, M, G and T, powers of 1024. The range is rounded out to blocks.
Without COMMAND the extents are printed, and the pin is held until SIGINT or SIGTERM.

With COMMAND nothing is printed. The pin is held until COMMAND and all its descendants have
ended. They may open the files for writing, under either gate, and use them as a holder may;
strangers may not. COMMAND finds the extents as JSON, an array with an object for each file, in
the file that MAPDIRECT_EXTENTS names, and at the descriptor MAPDIRECT_EXTENTS_FD. With --format
they are there in another form.

A range may go beyond the end of the file, as with mmap(2): stderr says then what is pinned of it. With
strength all nobody can write behind the end in that range, blocks that are allocated there stay, and
the file may still be made longer by truncate(2).

A filesystem's device is busy for device-mapper while it is mounted. A loop device over it is not:
--device names it in the table. docs/raw-access.md says what to flush and what to drop.")]
pub struct PinArgs {
    /// The files: all of them are pinned, or none
    #[arg(required = true, value_name = "FILE")]
    pub files: Vec<PathBuf>,
    /// Bytes to pin of each, as in 1M:2M; OFFSET: goes to the end, with strength stable however far
    /// the file grows [default: the whole file as it is now, or as it grows]
    #[arg(long, value_name = "OFFSET:LENGTH", value_parser = parse_range)]
    pub range: Option<ByteRange>,
    /// Pin the range, or the whole file with its size
    #[arg(long, value_enum, default_value = "range")]
    pub scope: ScopeChoice,
    /// Hold everything in the range, or what is stable or becomes so
    #[arg(long, value_enum, default_value = "all")]
    pub strength: StrengthChoice,
    /// How long to wait for others to let go of the file, in milliseconds
    #[arg(long, value_name = "MS", default_value = "100")]
    pub patience: u32,
    /// Allocate, write and unshare what is not before it is pinned, as `prepare` does
    #[arg(long)]
    pub prepare: bool,
    /// Fail unless every block of the range is stable: allocated, written and not shared
    #[arg(long)]
    pub require_stable: bool,
    /// Deny more than what would break the pin; can be given twice
    #[arg(long, value_enum, value_name = "WHAT")]
    pub deny: Vec<Denial>,
    /// What happens to COMMAND when the pin is lost or broken
    #[arg(long, value_enum, default_value = "warn", requires = "command")]
    pub on_loss: OnLoss,
    /// Print JSON
    #[arg(long, conflicts_with = "command")]
    pub json: bool,
    /// Print the extents in this form; with COMMAND, hand them to it so
    #[arg(long, value_enum, value_name = "FORMAT", conflicts_with = "json")]
    pub format: Option<PinFormat>,
    /// Name this device in a table for dmsetup, in place of the filesystem's, of which it shows all
    #[arg(long, value_name = "DEVICE", requires = "format")]
    pub device: Option<PathBuf>,
    /// Command to run while the pin is held
    #[arg(last = true, value_name = "COMMAND")]
    pub command: Vec<OsString>,
}

/// Arguments of `prepare`.
#[derive(Debug, Args)]
#[command(after_help = "\
Sizes take K, M, G and T, powers of 1024. The range is rounded out to blocks.
Says what was done and draws the block map. A bar on the terminal shows how far it has got.

With --contiguous each hole is asked for as a whole, and what is there already stays where it is:
for one run give a new file. A run cannot reach over the end of an allocation group of XFS, nor
over the metadata that ext4 keeps in some groups of 32,768 blocks (128 MiB of blocks of 4 KiB). It
may be several records for filefrag(8): ext4 has at most 32,768 blocks in one (32,767 that are
unwritten), XFS 2,097,151.")]
pub struct PrepareArgs {
    /// The file; with --size it is made if there is none, and removed again if that fails
    pub file: PathBuf,
    /// Make the file so long, with zeros; it never gets shorter
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    pub size: Option<u64>,
    /// Bytes to prepare, as in 1M:2M; OFFSET: goes to the end [default: the whole file]
    #[arg(long, value_name = "OFFSET:LENGTH", value_parser = parse_range)]
    pub range: Option<ByteRange>,
    /// How long to wait for I/O of others that uses pages of the file (DAX), in milliseconds
    #[arg(long, value_name = "MS", default_value = "10000")]
    pub patience: u32,
    /// Place new blocks so that huge pages (2 MiB) can map them, where the filesystem can
    #[arg(long)]
    pub huge: bool,
    /// Place new blocks in one run on the device, or say in how many they are and why
    #[arg(long, conflicts_with = "huge")]
    pub contiguous: bool,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
    /// Print the extents in this form, and nothing else
    #[arg(long, value_enum, value_name = "FORMAT", conflicts_with = "json")]
    pub format: Option<Format>,
    /// Name this device in a table for dmsetup, in place of the filesystem's, of which it shows all
    #[arg(long, value_name = "DEVICE", requires = "format")]
    pub device: Option<PathBuf>,
}

/// Arguments of `run`.
#[derive(Debug, Args)]
#[command(after_help = "\
GLOBs are matched with absolute paths without links; a relative one begins in the current
directory. * stays within a directory, ** does not. Ends as COMMAND does, as `pin` does.")]
pub struct RunArgs {
    /// Pin files with such paths
    #[arg(long, value_name = "GLOB", num_args = 1..)]
    pub files: Vec<PathBuf>,
    /// Pin what is mapped privately, too; libraries excepted
    #[arg(long)]
    pub private: bool,
    /// Hold what is stable or becomes so, however far a file grows; or everything, as it is
    #[arg(long, value_enum, default_value = "stable")]
    pub strength: StrengthChoice,
    /// Whether COMMAND may itself shorten files and punch holes (ftruncate, fallocate)
    #[arg(long, value_enum, default_value = "refuse")]
    pub own: OwnChoice,
    /// Have every block of a file allocated, written and shared with nobody before it is pinned
    #[arg(long)]
    pub prepare: bool,
    /// Refuse (ETXTBSY) what cannot be pinned
    #[arg(long)]
    pub strict: bool,
    /// Let COMMAND gain privileges by execve(2), as it could without this; needs CAP_SYS_ADMIN
    #[arg(long)]
    pub keep_privileges: bool,
    /// What to run
    #[arg(last = true, required = true, value_name = "COMMAND")]
    pub command: Vec<OsString>,
}

/// Arguments of `show`.
#[derive(Debug, Args)]
#[command(after_help = "\
The place on the disk is found through partitions, and through what device-mapper maps linearly
(LVM; only root can read its tables). Where it cannot be known, that is said. Before a form other
than json is printed the file is written to its device (fsync). Of a file that nobody has pinned
it may be false a moment later: `pin` has the same forms.

In columns every cell is one word, whatever strangers call their files and commands: a blank is
written \\x20, and a name is quoted as shells read it if it has a blank or a backslash in it, or
what a terminal cannot show: $'a\\x20b'. What there is none of is -.")]
pub struct ShowArgs {
    /// The files: one that cannot be shown does not stop the others
    #[arg(required = true, value_name = "FILE")]
    pub files: Vec<PathBuf>,
    /// List every extent, too
    #[arg(long, short)]
    pub extents: bool,
    /// Print a row for each extent and nothing else, with these columns, separated by commas
    #[arg(long, short = 'o', value_enum, value_name = "COLUMN,...", value_delimiter = ',',
          conflicts_with_all = ["json", "extents", "format"])]
    pub columns: Vec<ShowColumn>,
    /// Print no headings of columns
    #[arg(long, short, requires = "columns")]
    pub no_headings: bool,
    /// Write what is only in memory yet to the device first (fsync), as a pin does
    #[arg(long)]
    pub sync: bool,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
    /// Print the extents in this form, and nothing else
    #[arg(long, value_enum, value_name = "FORMAT", conflicts_with_all = ["json", "extents"])]
    pub format: Option<Format>,
    /// Name this device in a table for dmsetup, in place of the filesystem's, of which it shows all
    #[arg(long, value_name = "DEVICE", requires = "format")]
    pub device: Option<PathBuf>,
}

/// Arguments of `status`.
#[derive(Debug, Args)]
#[command(after_help = "\
In columns every cell is one word, whatever strangers call their files and commands: a blank is
written \\x20, and a name is quoted as shells read it if it has a blank or a backslash in it, or
what a terminal cannot show: $'a\\x20b'. Behind a name, as one word with it, is what must be said of
it: \\x20(deleted). What there is none of is -.")]
pub struct StatusArgs {
    /// Only these files: ends with status 1 if one of them is not pinned
    #[arg(value_name = "FILE")]
    pub files: Vec<PathBuf>,
    /// Print a row for each pin and nothing else, with these columns, separated by commas
    #[arg(
        long,
        short = 'o',
        value_enum,
        value_name = "COLUMN,...",
        value_delimiter = ',',
        conflicts_with = "json"
    )]
    pub columns: Vec<StatusColumn>,
    /// Print no headings of columns
    #[arg(long, short, requires = "columns")]
    pub no_headings: bool,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
    /// Print metrics as OpenMetrics text
    #[arg(long, conflicts_with = "json")]
    pub metrics: bool,
    /// Write the metrics to a file, and replace it at once, for a collector of text files; without
    /// a guard they say so
    #[arg(long, value_name = "PATH", conflicts_with_all = ["json", "metrics"])]
    pub metrics_file: Option<PathBuf>,
}

/// Arguments of `top`.
#[derive(Debug, Args)]
pub struct TopArgs {
    /// How often to ask the guard
    #[arg(long, value_name = "SECONDS", default_value = "1",
          value_parser = clap::value_parser!(u32).range(1..=3600))]
    pub interval: u32,
}

/// What a record tells of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum EventChoice {
    /// An operation was refused
    Refusal,
    /// Blocks of a pin have changed
    Breach,
}

/// Which records to show.
#[derive(Debug, Args)]
pub struct RecordFilters {
    /// Only those about this file, whatever its name is now or was
    #[arg(long, value_name = "PATH")]
    pub file: Option<PathBuf>,
    /// Only those of this process or thread
    #[arg(long, value_name = "PID")]
    pub pid: Option<i32>,
    /// Only those of this user, by number or name
    #[arg(long, value_name = "USER")]
    pub uid: Option<String>,
    /// Only those that met this pin
    #[arg(long, value_name = "ID")]
    pub pin: Option<u64>,
    /// Only those of this operation, by the word in the records: write, open-write, truncate
    #[arg(long, value_name = "WORD")]
    pub operation: Option<String>,
    /// Only those of this kind
    #[arg(long, value_enum)]
    pub kind: Option<EventChoice>,
}

/// Arguments of `watch`.
#[derive(Debug, Args)]
pub struct WatchArgs {
    /// Which records to show
    #[command(flatten)]
    pub filters: RecordFilters,
    /// Print JSON, an object in each line
    #[arg(long)]
    pub json: bool,
}

/// Arguments of `log`.
#[derive(Debug, Args)]
pub struct LogArgs {
    /// Only the last N
    #[arg(long, short = 'n', value_name = "N")]
    pub lines: Option<usize>,
    /// Only since then: 90s, 10m, 2h, 1d ago, or @SECONDS since the epoch
    #[arg(long, value_name = "TIME", value_parser = parse_since)]
    pub since: Option<Since>,
    /// Which records to show
    #[command(flatten)]
    pub filters: RecordFilters,
    /// Print JSON, an object in each line
    #[arg(long)]
    pub json: bool,
}

/// Arguments of `doctor`.
#[derive(Debug, Args)]
pub struct DoctorArgs {
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}
