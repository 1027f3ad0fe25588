//! What the task outside and the first process inside a virtual machine agree
//! on.

#![forbid(unsafe_code)]

pub mod wire;

/// Name of the virtio-serial port the two talk through.
pub const PORT: &str = "xtask";

/// Tag of the 9p filesystem that is the root of the machine outside.
pub const ROOT_TAG: &str = "root";

/// Directory of the initramfs with the modules to load, in the order of their
/// names; [`NVDIMM_MODULES`] only if there are NVDIMMs.
pub const MODULES: &str = "/modules";

/// As [`MODULES`].
pub const NVDIMM_MODULES: &str = "/modules-nvdimm";

/// File of the initramfs that says where outside the kernel's modules are.
pub const MODULES_OUTSIDE: &str = "/modules-outside";

/// File of the initramfs that says how many NVDIMMs there are.
pub const NVDIMMS: &str = "/nvdimms";

/// File of the initramfs that is there if systemd is to be the first process.
pub const SYSTEMD: &str = "/systemd";

/// Tag of the 9p filesystem with the root of the machine outside, where
/// [`ROOT_TAG`] is something else.
pub const BESIDE_TAG: &str = "beside";

/// File of the initramfs with the directories below [`BESIDE_TAG`] that are seen in
/// their places, one a line; there is none if nothing is.
pub const SHARED: &str = "/shared";
