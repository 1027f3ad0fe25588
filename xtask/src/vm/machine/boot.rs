//! What a machine is made of, and how QEMU is told.

use super::*;
use crate::arch::Arch;

/// An NVDIMM: a file that is the machine's memory, whose content outlives the
/// machine.
#[derive(Clone, Debug)]
pub(crate) struct Nvdimm {
    /// The file; made if it is not there.
    pub(crate) file: PathBuf,
    /// Bytes; a file that is there must be of this size.
    pub(crate) size: u64,
}

/// What the kernel takes of an NVDIMM at once.
pub(crate) const NVDIMM_UNIT: u64 = 2 << 20;
/// With less of it the kernel makes no disk in mode fsdax.
pub(super) const LEAST_NVDIMM: u64 = 16 << 20;

/// What the machine's clocks count.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Clock {
    /// The time of this machine.
    Time,
    /// A nanosecond for every instruction that a processor executes.
    Instructions,
}

/// A machine as it will be booted.
#[derive(Clone, Debug)]
pub(crate) struct Boot {
    arch: Arch,
    kernel: Kernel,
    init: PathBuf,
    /// What the machine has as its root.
    root: PathBuf,
    /// Directories of this machine that it sees in their places as well.
    shared: Vec<PathBuf>,
    memory: u64,
    processors: u32,
    clock: Clock,
    nvdimms: Vec<Nvdimm>,
    parameters: String,
    time_limit: Duration,
    interruption: Option<Arc<SignalFd>>,
    console_shown: bool,
    systemd: bool,
}

impl Boot {
    /// One with this kernel, and `init` as its first process.
    pub(crate) fn new(arch: Arch, kernel: Kernel, init: PathBuf) -> Self {
        Self {
            arch,
            root: PathBuf::from("/"),
            shared: Vec::new(),
            kernel,
            init,
            memory: 2 << 30,
            processors: 2,
            clock: Clock::Time,
            nvdimms: Vec::new(),
            parameters: String::new(),
            time_limit: Duration::from_secs(600),
            interruption: None,
            console_shown: false,
            systemd: false,
        }
    }

    /// What `uname -r` will say.
    pub(crate) fn release(&self) -> &str {
        self.kernel.release()
    }

    /// With another root than that of this machine, and some directories of this
    /// one.
    pub(crate) fn root(mut self, root: PathBuf, shared: Vec<PathBuf>) -> Self {
        self.root = root;
        self.shared = shared;
        self
    }

    /// With so many bytes of memory.
    pub(crate) fn memory(mut self, bytes: u64) -> Self {
        self.memory = bytes;
        self
    }

    /// With so many processors.
    pub(crate) fn processors(mut self, processors: u32) -> Self {
        self.processors = processors;
        self
    }

    /// With this clock.
    pub(crate) fn clock(mut self, clock: Clock) -> Self {
        self.clock = clock;
        self
    }

    /// With an NVDIMM: `/dev/pmem0` in the machine, `/dev/pmem1` when it is
    /// the second one, and so on.
    pub(crate) fn nvdimm(mut self, nvdimm: Nvdimm) -> Self {
        self.nvdimms.push(nvdimm);
        self
    }

    /// With more on the kernel's command line.
    pub(crate) fn parameters(mut self, words: &str) -> Self {
        words.clone_into(&mut self.parameters);
        self
    }

    /// With the systemd of this machine as its first process.
    pub(crate) fn systemd(mut self) -> Self {
        self.systemd = true;
        self
    }

    /// With so much time for everything, from the start on.
    pub(crate) fn time_limit(mut self, limit: Duration) -> Self {
        self.time_limit = limit;
        self
    }

    /// Whoever waits for the machine stops when one of these signals is
    /// there.
    pub(crate) fn interruption(mut self, signals: Arc<SignalFd>) -> Self {
        self.interruption = Some(signals);
        self
    }

    /// With everything the kernel says shown on standard error.
    pub(crate) fn console_shown(mut self, shown: bool) -> Self {
        self.console_shown = shown;
        self
    }

    /// Boots it and waits until programs can run.
    pub(crate) fn start(&self) -> Result<Machine> {
        let started = Instant::now();
        let directory = RunDirectory::new()?;
        let initramfs = directory.path().join("initramfs");
        self.write_initramfs(&initramfs)
            .with_context(|| format!("cannot write {}", initramfs.display()))?;
        for nvdimm in &self.nvdimms {
            nvdimm.make()?;
        }
        let listener = UnixListener::bind(directory.path().join("port"))?;
        let qemu = Qemu::start(self.command(directory.path())?)?;
        let mut machine = Machine {
            qemu,
            port: None,
            decoder: Decoder::default(),
            interruption: self.interruption.clone(),
            console_shown: self.console_shown.then_some(0),
            started,
            deadline: started + self.time_limit.min(BOOTS),
            booted_in: Duration::ZERO,
            directory,
        };
        machine.accept(&listener)?;
        match machine.receive()? {
            Message::Ready => {}
            Message::Failed(why) => {
                return Err(machine.failure(End::Crashed, &format!("it cannot get ready: {why}")));
            }
            other => bail!("the machine sent {other:?} before it was ready"),
        }
        machine.booted_in = started.elapsed();
        machine.deadline = started + self.time_limit;
        Ok(machine)
    }

    /// The kernel's own part, and one with what is different each time.
    fn write_initramfs(&self, path: &Path) -> Result<()> {
        let mut archive = cpio::Archive::default();
        for directory in [
            "/dev", "/proc", "/sys", "/outside", "/beside", "/written", "/root", "/seen",
        ] {
            archive.directory(directory);
        }
        archive.device("/dev/console", 0o600, (5, 1));
        archive.file("/init", 0o755, &fs::read(&self.init)?);
        let modules = self.kernel.modules().as_os_str().as_bytes();
        archive.file(xtask_init::MODULES_OUTSIDE, 0o644, modules);
        if self.systemd {
            archive.file(xtask_init::SYSTEMD, 0o644, &[]);
        }
        if !self.shared.is_empty() {
            let mut paths = Vec::new();
            for path in &self.shared {
                paths.extend(path.as_os_str().as_bytes());
                paths.push(b'\n');
            }
            archive.file(xtask_init::SHARED, 0o644, &paths);
        }
        let nvdimms = self.nvdimms.len().to_string();
        archive.file(xtask_init::NVDIMMS, 0o644, nvdimms.as_bytes());
        let mut file = File::create(path)?;
        file.write_all(&archive.finish())?;
        std::io::copy(&mut File::open(self.kernel.initramfs())?, &mut file)?;
        Ok(())
    }

    fn command(&self, directory: &Path) -> Result<Command> {
        // QEMU goes with this process, however that ends.
        let mut command = Command::new("setpriv");
        command.args(["--pdeathsig", "KILL", "--", &self.arch.qemu()]);
        command.args(["-nodefaults", "-no-user-config", "-display", "none"]);
        // A kernel that panics reboots, and that is the end.
        command.arg("-no-reboot");
        command.args(accelerator(self.arch, self.clock)?);
        let mut memory = format!("{}M", self.memory >> 20);
        let mut machine = String::from(match self.arch {
            Arch::X86_64 => "pc,usb=off,vmport=off",
            Arch::Aarch64 => "virt",
        });
        ensure!(
            self.nvdimms.is_empty() || self.arch == Arch::X86_64,
            "only machines of x86_64 have NVDIMMs here"
        );
        if !self.nvdimms.is_empty() {
            // They lie behind the memory, each at a multiple of 1 GiB.
            let room = (self.nvdimms.len() as u64 + 1) << 30;
            let sizes = self.nvdimms.iter().map(|nvdimm| nvdimm.size);
            let most = sizes.fold(self.memory.saturating_add(room), u64::saturating_add);
            memory.push_str(&format!(
                ",slots={},maxmem={}M",
                self.nvdimms.len(),
                most >> 20
            ));
            machine.push_str(",nvdimm=on");
        }
        for (number, nvdimm) in self.nvdimms.iter().enumerate() {
            let file = fs::canonicalize(&nvdimm.file)?;
            let object = format!(
                "memory-backend-file,id=nvdimm{number},share=on,size={},mem-path=",
                nvdimm.size
            );
            command.arg("-object").arg(with_path(&object, &file));
            let device = format!("nvdimm,id=dimm{number},memdev=nvdimm{number}");
            command.args(["-device", &device]);
        }
        command.args(["-machine", &machine, "-m", &memory]);
        command.args(["-smp", &self.processors.to_string()]);
        command.arg("-kernel").arg(self.kernel.image());
        command.arg("-initrd").arg(directory.join("initramfs"));
        command.arg("-append").arg(self.kernel_parameters());
        command
            .arg("-serial")
            .arg(with_path("file:", &directory.join("console")));
        command
            .arg("-chardev")
            .arg(with_path("socket,id=port,path=", &directory.join("port")));
        command.args(["-device", "virtio-serial-pci"]);
        let port = format!("virtserialport,chardev=port,name={}", xtask_init::PORT);
        command.args(["-device", &port]);
        let mut shares = vec![("root", self.root.as_path(), xtask_init::ROOT_TAG)];
        if !self.shared.is_empty() {
            shares.push(("beside", Path::new("/"), xtask_init::BESIDE_TAG));
        }
        for (name, path, tag) in shares {
            let export =
                format!("local,id={name},readonly=on,security_model=none,multidevs=remap,path=");
            command.arg("-fsdev").arg(with_path(&export, path));
            let device = format!("virtio-9p-pci,fsdev={name},mount_tag={tag}");
            command.args(["-device", &device]);
        }
        command
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(File::create(directory.join("qemu"))?)
            // Ctrl-C on the terminal is for this process to deal with.
            .process_group(0);
        unblocked_in_child(&mut command);
        Ok(command)
    }

    fn kernel_parameters(&self) -> String {
        let mut words = vec![
            match self.arch {
                Arch::X86_64 => "console=ttyS0",
                Arch::Aarch64 => "console=ttyAMA0",
            },
            "panic=-1",
            // What went wrong is to be seen, not to be lived with.
            "oops=panic",
            // It costs an emulated processor much, and protects nobody here.
            "mitigations=off",
            "random.trust_cpu=on",
        ];
        if self.arch == Arch::X86_64 && !has_kvm() {
            // Its clock needs no trial.
            words.extend(["tsc=reliable", "no_timer_check"]);
        }
        words.push(&self.parameters);
        words.join(" ").trim_end().to_owned()
    }
}

impl Nvdimm {
    fn make(&self) -> Result<()> {
        let path = self.file.display();
        ensure!(
            self.size >= LEAST_NVDIMM && self.size.is_multiple_of(NVDIMM_UNIT),
            "an NVDIMM is a multiple of {} MiB, and {} MiB at least",
            NVDIMM_UNIT >> 20,
            LEAST_NVDIMM >> 20
        );
        let file = File::options()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(&self.file)
            .with_context(|| format!("cannot open {path}"))?;
        let size = file.metadata()?.len();
        if size == 0 {
            file.set_len(self.size)?;
        } else {
            ensure!(
                size == self.size,
                "{path} has {size} bytes, and the NVDIMM is to have {}",
                self.size
            );
        }
        Ok(())
    }
}

/// An option of QEMU's that ends in a path, where a comma would end it.
pub(super) fn with_path(option: &str, path: &Path) -> OsString {
    use std::os::unix::ffi::OsStringExt;
    let mut bytes = option.as_bytes().to_vec();
    for byte in path.as_os_str().as_bytes() {
        bytes.push(*byte);
        if *byte == b',' {
            bytes.push(b',');
        }
    }
    OsString::from_vec(bytes)
}

/// How the machine's processors run.
pub(super) fn accelerator(arch: Arch, clock: Clock) -> Result<Vec<&'static str>> {
    // Signing pointers as the processor does it takes an emulator most of its
    // time; nobody forges any here.
    let emulated = match arch {
        Arch::X86_64 => "max",
        Arch::Aarch64 => "max,pauth-impdef=on",
    };
    if clock == Clock::Instructions {
        ensure!(
            arch == Arch::X86_64,
            "instructions are counted on x86_64 only"
        );
        // Where it moves memory by one instruction, each step of that would
        // be counted as one: without those it takes a loop.
        return Ok(vec![
            "-accel",
            "tcg,thread=single",
            "-cpu",
            "max,-erms,-fsrm",
            "-icount",
            "shift=0,sleep=off",
        ]);
    }
    if arch == Arch::OWN && has_kvm() {
        return Ok(vec!["-accel", "kvm", "-cpu", "host"]);
    }
    let mut qemu = Command::new(arch.qemu());
    let output = qemu
        .arg("--version")
        .stdin(Stdio::null())
        .output()
        .with_context(|| format!("cannot run {}", arch.qemu()))?;
    let text = String::from_utf8_lossy(&output.stdout);
    let version = parse_version(&text).with_context(|| format!("QEMU has no version: {text}"))?;
    // Before 8.1 an emulated processor could go on with instructions that
    // another one had just overwritten. Linux overwrites its own all the
    // time, for tracepoints, BPF and static keys, and crashes then. Where all
    // processors take turns in one thread that does not happen.
    Ok(if version >= (8, 1) {
        vec!["-accel", "tcg,thread=multi", "-cpu", emulated]
    } else {
        vec!["-accel", "tcg,thread=single", "-cpu", emulated]
    })
}

/// Reads a text such as `QEMU emulator version 7.2.22 (Debian ...)`.
pub(super) fn parse_version(text: &str) -> Option<(u32, u32)> {
    let (_, version) = text.split_once(" version ")?;
    let mut numbers = version.split(|c: char| !c.is_ascii_digit());
    Some((numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?))
}

/// Whether the processor itself can run machines. A device alone is not
/// enough: some kernels offer one for guests that are made for it.
pub(super) fn has_kvm() -> bool {
    let virtualizes = fs::read_to_string("/proc/cpuinfo").is_ok_and(|text| {
        text.lines()
            .find(|line| line.starts_with("flags"))
            .is_some_and(|flags| flags.split(' ').any(|flag| flag == "vmx" || flag == "svm"))
    });
    virtualizes
        && File::options()
            .read(true)
            .write(true)
            .open("/dev/kvm")
            .is_ok()
}
