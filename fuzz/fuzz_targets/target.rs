//! One target of many: which one, says the name of the binary.

#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| mapdirect_fuzz::run(env!("CARGO_BIN_NAME"), bytes));
