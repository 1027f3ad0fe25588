//! Which kernel modules to load, and in which order.

use anyhow::{Result, bail};
use std::collections::{HashMap, HashSet};

/// What depmod found out about the modules of a kernel.
#[derive(Debug)]
pub(crate) struct Modules {
    /// By name: path below the directory of modules, and the paths of what
    /// must be there before.
    loadable: HashMap<String, (String, Vec<String>)>,
    builtin: HashSet<String>,
}

impl Modules {
    /// Reads `modules.dep` and `modules.builtin`.
    pub(crate) fn parse(dependencies: &str, builtin: &str) -> Self {
        let loadable = dependencies
            .lines()
            .filter_map(|line| {
                let (path, needs) = line.split_once(':')?;
                let needs = needs.split_whitespace().map(str::to_owned).collect();
                Some((name(path).to_owned(), (path.to_owned(), needs)))
            })
            .map(|(name, found)| (name.replace('-', "_"), found))
            .collect();
        let builtin = builtin
            .lines()
            .map(|path| name(path).replace('-', "_"))
            .collect();
        Self { loadable, builtin }
    }

    /// Paths of the modules that give `wanted`, in the order to load them
    /// in; nothing for what is built in.
    pub(crate) fn order(&self, wanted: &[&str]) -> Result<Vec<&str>> {
        let mut paths: Vec<&str> = Vec::new();
        for name in wanted {
            let Some((path, needs)) = self.loadable.get(*name) else {
                if self.builtin.contains(*name) {
                    continue;
                }
                bail!("this kernel has no module {name}");
            };
            // What a module needs comes before what those need in turn.
            for path in needs.iter().rev().chain([path]) {
                if !paths.contains(&path.as_str()) {
                    paths.push(path);
                }
            }
        }
        Ok(paths)
    }
}

/// The name of the module in a file.
pub(crate) fn name(path: &str) -> &str {
    let file = path.rsplit('/').next().unwrap_or(path);
    file.split_once(".ko").map_or(file, |(name, _)| name)
}

#[cfg(test)]
mod tests {
    use super::*;

    const DEPENDENCIES: &str = "\
kernel/drivers/nvdimm/nd_pmem.ko.xz: kernel/drivers/nvdimm/nd_btt.ko.xz kernel/drivers/nvdimm/libnvdimm.ko.xz
kernel/drivers/nvdimm/nd_btt.ko.xz: kernel/drivers/nvdimm/libnvdimm.ko.xz
kernel/drivers/nvdimm/libnvdimm.ko.xz:
kernel/drivers/acpi/nfit/nfit.ko.xz: kernel/drivers/nvdimm/libnvdimm.ko.xz
kernel/net/9p/9pnet-virtio.ko: kernel/net/9p/9pnet.ko
";

    #[test]
    fn what_is_needed_comes_first() {
        let modules = Modules::parse(DEPENDENCIES, "kernel/fs/xfs/xfs.ko\n");
        assert_eq!(
            modules.order(&["xfs", "nfit", "nd_pmem"]).unwrap(),
            [
                "kernel/drivers/nvdimm/libnvdimm.ko.xz",
                "kernel/drivers/acpi/nfit/nfit.ko.xz",
                "kernel/drivers/nvdimm/nd_btt.ko.xz",
                "kernel/drivers/nvdimm/nd_pmem.ko.xz",
            ]
        );
        assert_eq!(
            modules.order(&["9pnet_virtio"]).unwrap(),
            ["kernel/net/9p/9pnet.ko", "kernel/net/9p/9pnet-virtio.ko"]
        );
    }

    #[test]
    fn what_is_not_there_is_named() {
        let modules = Modules::parse(DEPENDENCIES, "");
        let error = modules.order(&["xfs"]).unwrap_err().to_string();
        assert!(error.contains("xfs"), "{error}");
    }
}
