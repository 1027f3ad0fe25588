//! Debian's kernels, from the mirror that apt is set up with.
//!
//! apt itself is the client, with lists and archives of its own beside those
//! of the system: it looks through releases this machine does not install
//! from, and the system's state stays as it is. So a package is what Debian
//! signed: apt checks the signature of each release against Debian's keyring,
//! and what it fetches against the sums in it. What comes from the mirror
//! without a signature is refused. What is not checked is whether a release
//! is the latest one: who sits between here and the mirror can withhold
//! newer kernels.

use super::version::Version;
use crate::arch::Arch;
use anyhow::{Context, Result, bail, ensure};
use std::collections::BTreeMap;
use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// Releases with kernels of their own, the oldest first. What a mirror does
/// not have is passed over: releases come and go.
const STABLE: [&str; 2] = ["bookworm", "trixie"];
const LATER: [&str; 3] = ["forky", "sid", "experimental"];

/// What makes up a kernel: one package up to 6.18, several later.
const PARTS: [&str; 4] = [
    "linux-image-",
    "linux-base-",
    "linux-binary-",
    "linux-modules-",
];

/// The kernels of one upstream version, such as 6.12 or 7.3.4.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Series(String);

impl Series {
    /// Reads one; nothing else begins with a digit and has but digits and
    /// dots.
    pub(crate) fn parse(text: &str) -> Option<Self> {
        let mut numbers = text.split('.');
        let all = numbers
            .clone()
            .all(|number| !number.is_empty() && number.bytes().all(|byte| byte.is_ascii_digit()));
        (all && numbers.nth(1).is_some()).then(|| Self(text.to_owned()))
    }

    /// Whether a version is of this series.
    pub(crate) fn has(&self, version: &Version) -> bool {
        version
            .upstream()
            .strip_prefix(&self.0)
            .is_some_and(|rest| !rest.starts_with(|c: char| c.is_ascii_digit()))
    }
}

impl fmt::Display for Series {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// A package as the mirror offers it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Package {
    name: String,
    version: Version,
    /// Names of what it needs in exactly this version.
    needs: Vec<String>,
    /// Bytes to fetch.
    size: u64,
    /// Bytes unpacked.
    installed: u64,
}

/// Reads what `apt-cache show` prints: paragraphs of `Name: value`.
fn parse(text: &str) -> Vec<Package> {
    text.split("\n\n").filter_map(parse_paragraph).collect()
}

fn parse_paragraph(paragraph: &str) -> Option<Package> {
    let field = |name: &str| {
        paragraph
            .lines()
            .find_map(|line| line.strip_prefix(name)?.strip_prefix(": "))
    };
    let version = field("Version")?;
    // As in `kmod, linux-base-7.3-amd64 (= 7.3.4-1), a | b`.
    let exactly = format!(" (= {version})");
    let needs = field("Depends")
        .unwrap_or("")
        .split(", ")
        .filter_map(|dependency| dependency.strip_suffix(&exactly))
        .map(str::to_owned)
        .collect();
    Some(Package {
        name: field("Package")?.to_owned(),
        version: Version::new(version),
        needs,
        size: field("Size")?.parse().ok()?,
        installed: field("Installed-Size")?.parse::<u64>().ok()? << 10,
    })
}

impl Package {
    /// Whether it is the image of a kernel of a flavour.
    fn is_image(&self, flavour: &str) -> bool {
        let name = self.name.strip_suffix("-unsigned").unwrap_or(&self.name);
        name.strip_prefix(PARTS[0])
            .and_then(|name| name.strip_suffix(flavour))
            .is_some_and(|abi| {
                // Up to 6.1 there is a number behind the version, as in
                // 6.1.0-56; another flavour would be a word there.
                let (version, number) = abi.split_once('-').unwrap_or((abi, ""));
                version.starts_with(|c: char| c.is_ascii_digit())
                    && number.bytes().all(|byte| byte.is_ascii_digit())
            })
    }

    fn is_signed(&self) -> bool {
        !self.name.ends_with("-unsigned")
    }
}

/// The packages that make up the newest kernel of a series, its image first.
fn choose<'a>(packages: &'a [Package], series: &Series, flavour: &str) -> Option<Vec<&'a Package>> {
    let mut images: Vec<_> = packages
        .iter()
        .filter(|package| package.is_image(flavour) && series.has(&package.version))
        .collect();
    images.sort_by(|a, b| {
        let newest_first = b.version.cmp(&a.version);
        newest_first.then(b.is_signed().cmp(&a.is_signed()))
    });
    // A mirror that is being updated may lack a part of the newest.
    images
        .into_iter()
        .find_map(|image| with_parts(packages, image))
}

/// An image and every other part of its kernel.
fn with_parts<'a>(packages: &'a [Package], image: &'a Package) -> Option<Vec<&'a Package>> {
    let mut chosen = vec![image];
    let mut next = 0;
    while let Some(package) = chosen.get(next) {
        for name in &package.needs {
            let is_part = PARTS.iter().any(|part| name.starts_with(part));
            let already = chosen.iter().any(|package| package.name == *name);
            if is_part && !already {
                chosen.push(packages.iter().find(|candidate| {
                    candidate.name == *name && candidate.version == image.version
                })?);
            }
        }
        next += 1;
    }
    Some(chosen)
}

/// Every series that is there, such as 6.12.
fn all_series(packages: &[Package], flavour: &str) -> Vec<String> {
    let mut found: BTreeMap<Version, String> = BTreeMap::new();
    for package in packages.iter().filter(|package| package.is_image(flavour)) {
        let series = package.version.upstream();
        let end = series
            .match_indices(|c: char| !c.is_ascii_digit())
            .nth(1)
            .map_or(series.len(), |(at, _)| at);
        let series = series[..end].to_owned();
        found.insert(Version::new(&series), series);
    }
    found.into_values().collect()
}

/// A kernel to be had.
#[derive(Debug)]
pub(crate) struct Offer {
    packages: Vec<Package>,
}

impl Offer {
    /// Its version in Debian.
    pub(crate) fn version(&self) -> &Version {
        // The image, which is chosen first.
        &self.packages[0].version
    }

    /// Bytes of disk that fetching and unpacking it takes.
    pub(crate) fn size(&self) -> u64 {
        self.packages
            .iter()
            .map(|package| package.size + package.installed)
            .sum()
    }
}

/// apt with a state of its own.
pub(crate) struct Apt {
    directory: PathBuf,
    arch: Arch,
}

impl Apt {
    /// Sets it up in a directory; nobody else may use that at the same time.
    pub(crate) fn new(directory: &Path, arch: Arch) -> Result<Self> {
        for name in ["state/lists/partial", "cache/archives/partial"] {
            fs::create_dir_all(directory.join(name))?;
        }
        // Nothing is installed.
        fs::write(directory.join("status"), "")?;
        Ok(Self {
            directory: directory.to_owned(),
            arch,
        })
    }

    /// One of apt's commands.
    fn command(&self, name: &str) -> Command {
        let mut command = Command::new(name);
        let directory = self.directory.display();
        for option in [
            format!("Dir::State={directory}/state"),
            format!("Dir::State::status={directory}/status"),
            format!("Dir::Cache={directory}/cache"),
            format!("Dir::Etc::SourceList={directory}/sources.list"),
            String::from("Dir::Etc::SourceParts=/dev/null"),
            format!("APT::Architecture={}", self.arch.debian()),
            format!("APT::Architectures={}", self.arch.debian()),
            String::from("Acquire::IndexTargets::deb::DEP-11::DefaultEnabled=false"),
            String::from("Acquire::Languages=none"),
            String::from("Acquire::Retries=3"),
        ] {
            command.arg("-o").arg(option);
        }
        command.env("LC_ALL", "C").stdin(Stdio::null());
        command
    }

    /// Looks for the newest kernel of a series.
    pub(crate) fn find(&self, series: &Series) -> Result<Offer> {
        let (sources, suites) = sources(&mirrors()?, self.arch)?;
        let flavour = self.arch.flavour();
        fs::write(self.directory.join("sources.list"), sources)?;
        // It fails when one release of many is not there: that is no reason
        // to stop, but the reason if nothing is found.
        let mut update = self.command("apt-get");
        update.args(["-o", "APT::Update::Error-Mode=any", "-q", "update"]);
        let updated = output(&mut update);
        let mut show = self.command("apt-cache");
        show.arg("show");
        show.args(PARTS.map(|part| format!("{part}[0-9]*{flavour}*")));
        let packages = match output(&mut show) {
            Ok(text) => parse(&text),
            // It fails when nothing has such a name.
            Err(_) => Vec::new(),
        };
        if let Some(chosen) = choose(&packages, series, &flavour) {
            return Ok(Offer {
                packages: chosen.into_iter().cloned().collect(),
            });
        }
        updated.context("cannot fetch every list of kernels from the mirror")?;
        bail!(
            "no kernel {series} is in {}; there are {}",
            suites.join(", "),
            all_series(&packages, &flavour).join(", ")
        )
    }

    /// Fetches the packages of a kernel into a directory.
    pub(crate) fn fetch(&self, offer: &Offer, into: &Path) -> Result<Vec<PathBuf>> {
        let mut download = self.command("apt-get");
        download.args(["-q", "download"]).current_dir(into);
        for package in &offer.packages {
            download.arg(format!("{}={}", package.name, package.version));
        }
        output(&mut download).context("cannot fetch the kernel from the mirror")?;
        let mut paths: Vec<_> = fs::read_dir(into)?
            .map(|entry| Ok(entry?.path()))
            .collect::<Result<_>>()?;
        paths.retain(|path| path.extension().is_some_and(|extension| extension == "deb"));
        ensure!(
            paths.len() == offer.packages.len(),
            "apt-get fetched {} packages instead of {}",
            paths.len(),
            offer.packages.len()
        );
        Ok(paths)
    }
}

impl Apt {
    /// Fetches packages of this machine's own release, for the architecture, and
    /// everything that they depend on; returns where they are.
    pub(crate) fn fetch_with_needs(&self, names: &[&str]) -> Result<Vec<PathBuf>> {
        let mirrors = mirrors()?;
        let main = mirrors.main.as_ref();
        let main = main.context("apt is not set up with a Debian mirror")?;
        let release = own_release()?;
        let mut list = source(self.arch, main, &release);
        if let Some(security) = &mirrors.security {
            list.push_str(&source(self.arch, security, &format!("{release}-security")));
        }
        fs::write(self.directory.join("sources.list"), list)?;
        output(self.command("apt-get").args(["-q", "update"]))?;
        let mut install = self.command("apt-get");
        install.args([
            "-o",
            "APT::Install-Recommends=false",
            "-o",
            "Debug::NoLocking=1",
        ]);
        install
            .args(["-q", "-y", "--download-only", "install"])
            .args(names);
        output(&mut install).context("cannot fetch packages from the mirror")?;
        let mut paths: Vec<_> = fs::read_dir(self.directory.join("cache/archives"))?
            .map(|entry| Ok(entry?.path()))
            .collect::<Result<_>>()?;
        paths.retain(|path| path.extension().is_some_and(|extension| extension == "deb"));
        paths.sort();
        Ok(paths)
    }
}

/// The release of Debian that this machine runs: the compilers for other machines
/// come with the libraries of that one.
fn own_release() -> Result<String> {
    let text = fs::read_to_string("/etc/os-release").context("there is no /etc/os-release")?;
    let name = text
        .lines()
        .find_map(|line| line.strip_prefix("VERSION_CODENAME="))
        .map(|name| name.trim_matches('"').to_owned());
    name.context("/etc/os-release does not say which release of Debian this is")
}

/// Where Debian's packages come from.
#[derive(Debug, Default, PartialEq, Eq)]
struct Mirrors {
    main: Option<String>,
    security: Option<String>,
}

/// Those apt is set up with.
fn mirrors() -> Result<Mirrors> {
    // Unlike apt's own way to ask for this it works before the first update,
    // and for everybody.
    let text = output(
        Command::new("apt-get")
            .args(["-o", "Debug::NoLocking=1", "update", "--print-uris"])
            .env("LC_ALL", "C"),
    )
    .context("cannot ask apt for the mirror it is set up with")?;
    Ok(parse_mirrors(&text))
}

/// Reads lines such as `'http://mirror/debian/dists/trixie/InRelease' name 0`.
fn parse_mirrors(text: &str) -> Mirrors {
    let classes = ["oldstable", "stable", "testing", "unstable"];
    let mut mirrors = Mirrors::default();
    for line in text.lines() {
        let address = line
            .strip_prefix('\'')
            .and_then(|line| line.split_once("/InRelease' "))
            .and_then(|(address, _)| address.split_once("/dists/"));
        let Some((mirror, release)) = address else {
            continue;
        };
        let (name, pocket) = release.split_once('-').unwrap_or((release, ""));
        // Others than Debian have repositories, too.
        if !STABLE
            .iter()
            .chain(&LATER)
            .chain(&classes)
            .any(|known| name == *known)
        {
            continue;
        }
        let place = match pocket {
            "security" => &mut mirrors.security,
            "" => &mut mirrors.main,
            _ => continue,
        };
        place.get_or_insert_with(|| mirror.to_owned());
    }
    mirrors
}

/// The text of a sources.list, and the releases in it.
fn sources(mirrors: &Mirrors, arch: Arch) -> Result<(String, Vec<String>)> {
    let main = mirrors.main.as_ref().context(
        "apt is not set up with a Debian mirror, where the kernels come from; \
         give a kernel of your own with --kernel PATH",
    )?;
    let mut found = Vec::new();
    for release in STABLE {
        found.push((main, release.to_owned()));
        found.push((main, format!("{release}-backports")));
        if let Some(security) = &mirrors.security {
            found.push((security, format!("{release}-security")));
        }
    }
    found.extend(LATER.map(|release| (main, release.to_owned())));
    let text = found
        .iter()
        .map(|(mirror, release)| source(arch, mirror, release))
        .collect();
    let releases = found.into_iter().map(|(_, release)| release).collect();
    Ok((text, releases))
}

/// A line of a sources.list.
fn source(arch: Arch, mirror: &str, release: &str) -> String {
    let signed_by = keyring().map_or_else(String::new, |keyring| format!(" signed-by={keyring}"));
    let arch = arch.debian();
    format!("deb [arch={arch}{signed_by}] {mirror} {release} main\n")
}

/// Debian's keyring; without it apt takes those it trusts for everything.
fn keyring() -> Option<&'static str> {
    [
        "/usr/share/keyrings/debian-archive-keyring.pgp",
        "/usr/share/keyrings/debian-archive-keyring.gpg",
    ]
    .into_iter()
    .find(|path| Path::new(path).exists())
}

/// Runs a command that must succeed and returns what it prints.
fn output(command: &mut Command) -> Result<String> {
    let output = command
        .output()
        .with_context(|| format!("cannot run {}", command.get_program().display()))?;
    let complaint = String::from_utf8_lossy(&output.stderr);
    ensure!(
        output.status.success(),
        "{} failed: {}",
        command.get_program().display(),
        complaint.trim()
    );
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn paragraph(name: &str, version: &str, depends: &str) -> String {
        format!(
            "Package: {name}\nVersion: {version}\nInstalled-Size: 4\nDepends: {depends}\n\
             Description: a kernel\n of many lines\nSize: 100\n"
        )
    }

    fn offered() -> Vec<Package> {
        let rest = "kmod, initramfs-tools (>= 0.120+deb8u2) | linux-initramfs-tool";
        let parts = "dracut | initramfs-tools, linux-base-7.3.4+deb13-amd64 (= 7.3.4-1), \
                     linux-modules-7.3.4+deb13-amd64 (= 7.3.4-1)";
        let experimental = "linux-modules-7.3-amd64 (= 7.3~rc7-1~exp1)";
        let lacks_a_part = "linux-modules-7.3.5+deb14-amd64 (= 7.3.5-1)";
        let text = [
            paragraph("linux-image-6.1.0-50-amd64", "6.1.176-1", rest),
            paragraph("linux-image-6.1.0-56-amd64-unsigned", "6.1.192-2", rest),
            paragraph("linux-image-6.1.0-56-amd64", "6.1.192-2", rest),
            paragraph("linux-image-6.1.0-57-cloud-amd64", "6.1.193-1", rest),
            paragraph("linux-image-6.1.0-57-amd64-dbg", "6.1.193-1", rest),
            paragraph("linux-image-6.12.9+deb13-amd64-unsigned", "6.12.9-1", rest),
            paragraph("linux-image-6.12.9+deb13-rt-amd64", "6.12.10-1", rest),
            paragraph("linux-image-amd64", "6.12.11-1", rest),
            paragraph("linux-image-7.3.5+deb14-amd64", "7.3.5-1", lacks_a_part),
            paragraph("linux-image-7.3.4+deb13-amd64", "7.3.4-1", parts),
            paragraph("linux-base-7.3.4+deb13-amd64", "7.3.4-1", ""),
            paragraph("linux-modules-7.3.4+deb13-amd64", "7.3.4-2", ""),
            paragraph("linux-modules-7.3.4+deb13-amd64", "7.3.4-1", "kmod"),
            paragraph("linux-image-7.3-amd64", "7.3~rc7-1~exp1", experimental),
            paragraph("linux-modules-7.3-amd64", "7.3~rc7-1~exp1", ""),
        ];
        parse(&text.join("\n"))
    }

    fn chosen(series: &str) -> Vec<String> {
        let packages = offered();
        choose(&packages, &Series::parse(series).unwrap(), "-amd64")
            .unwrap_or_default()
            .iter()
            .map(|package| format!("{}={}", package.name, package.version))
            .collect()
    }

    #[test]
    fn packages_are_parsed() {
        let packages = offered();
        assert_eq!(packages.len(), 15);
        let package = &packages[9];
        assert_eq!(package.name, "linux-image-7.3.4+deb13-amd64");
        assert_eq!(package.size, 100);
        assert_eq!(package.installed, 4096);
        assert_eq!(
            package.needs,
            [
                "linux-base-7.3.4+deb13-amd64",
                "linux-modules-7.3.4+deb13-amd64"
            ]
        );
        assert_eq!(parse("Package: x\nVersion: 1\n\n\n"), []);
    }

    #[test]
    fn the_newest_of_a_series_that_is_whole_is_chosen() {
        assert_eq!(chosen("6.1"), ["linux-image-6.1.0-56-amd64=6.1.192-2"]);
        assert_eq!(chosen("6.1.176"), ["linux-image-6.1.0-50-amd64=6.1.176-1"]);
        assert_eq!(
            chosen("6.12"),
            ["linux-image-6.12.9+deb13-amd64-unsigned=6.12.9-1"]
        );
        assert_eq!(
            chosen("7.3"),
            [
                "linux-image-7.3.4+deb13-amd64=7.3.4-1",
                "linux-base-7.3.4+deb13-amd64=7.3.4-1",
                "linux-modules-7.3.4+deb13-amd64=7.3.4-1"
            ]
        );
        assert!(chosen("6.11").is_empty());
        assert!(chosen("7.30").is_empty());
        assert_eq!(all_series(&offered(), "-amd64"), ["6.1", "6.12", "7.3"]);
    }

    #[test]
    fn a_series_is_a_number_with_dots() {
        for text in ["7.3", "6.12.117"] {
            assert!(Series::parse(text).is_some(), "{text}");
        }
        for text in ["", "7", "7.", ".3", "./7.3", "7.3/", "7.3-rc1", "linux.deb"] {
            assert!(Series::parse(text).is_none(), "{text}");
        }
    }

    #[test]
    fn mirrors_are_those_of_debian() {
        let text = "\
'https://other.example/dists/nodistro/InRelease' a 0
'http://b.example/debian/dists/bookworm-updates/InRelease' b 0
'http://a.example/debian/dists/bookworm/InRelease' c 0
'http://c.example/debian/dists/trixie/InRelease' d 0
'http://s.example/debian-security/dists/bookworm-security/InRelease' e 0
'http://a.example/debian/dists/bookworm/main/binary-amd64/Packages.xz' f 0
";
        let mirrors = parse_mirrors(text);
        assert_eq!(mirrors.main.as_deref(), Some("http://a.example/debian"));
        assert_eq!(
            mirrors.security.as_deref(),
            Some("http://s.example/debian-security")
        );
        let (text, releases) = sources(&mirrors, Arch::X86_64).unwrap();
        assert!(text.contains("http://a.example/debian experimental main\n"));
        assert!(text.contains("http://s.example/debian-security trixie-security main\n"));
        assert!(releases.contains(&String::from("trixie-backports")));
        assert!(
            sources(
                &parse_mirrors("'http://u.example/dists/noble/InRelease' g 0\n"),
                Arch::X86_64
            )
            .is_err()
        );
    }
}
