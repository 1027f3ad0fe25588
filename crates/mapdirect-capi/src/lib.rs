//! libmapdirect: the library for C, and for whatever calls C.
//!
//! Each function is a few lines around the crate `mapdirect`: arguments are
//! checked, what is at an address or behind a number is looked up in a table
//! (`table`), the crate is called, and its error becomes an errno and words
//! (`boundary`). `include/mapdirect.h` is generated from this source, and
//! `man/mapdirect.3` is the manual.
//!
//! No lock of this crate is held while a thread calls fork(2) that the child
//! could miss: see `table`.

#![deny(unsafe_code)]

#[expect(unsafe_code, reason = "the entry points take pointers from C")]
mod api;
mod boundary;
#[expect(unsafe_code, reason = "bytes are flushed by address")]
mod hints;
#[expect(unsafe_code, reason = "entries are shared by a lock of its own")]
mod table;

pub use api::*;
