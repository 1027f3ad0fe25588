//! io_uring.

use super::*;

/// How an io_uring request is executed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Uring {
    /// By the submitting thread where possible.
    Inline,
    /// By a worker (`IOSQE_ASYNC`).
    Worker,
    /// By the polling kernel thread (`IORING_SETUP_SQPOLL`).
    Polled,
}

pub(super) fn submit(how: Uring, entry: squeue::Entry) -> Result<i32> {
    let mut builder = IoUring::builder();
    if how == Uring::Polled {
        builder.setup_sqpoll(50);
    }
    let mut ring: IoUring = builder.build(4).map_err(|error| of_io(&error))?;
    let entry = if how == Uring::Worker {
        entry.flags(squeue::Flags::ASYNC)
    } else {
        entry
    };
    // SAFETY: the callers keep what the entry points to alive until this
    // function has seen the completion.
    unsafe { ring.submission().push(&entry) }.map_err(|_| Errno::NOMEM)?;
    ring.submit_and_wait(1).map_err(|error| of_io(&error))?;
    let completion = ring.completion().next().ok_or(Errno::IO)?;
    of_result(completion.result().into()).map(|result| i32::try_from(result).unwrap_or(i32::MAX))
}

/// An io_uring that has `file` registered, and nothing else that keeps it
/// open.
pub fn ring_with_file(file: std::fs::File) -> Result<IoUring> {
    let ring: IoUring = IoUring::new(4).map_err(|error| of_io(&error))?;
    ring.submitter()
        .register_files(&[file.as_raw_fd()])
        .map_err(|error| of_io(&error))?;
    drop(file);
    Ok(ring)
}

pub(super) fn of_io(error: &std::io::Error) -> Errno {
    Errno::from_io_error(error).unwrap_or(Errno::IO)
}

/// `IORING_OP_WRITE`.
pub fn uring_write(
    how: Uring,
    file: BorrowedFd<'_>,
    bytes: &[u8],
    offset: u64,
    rw_flags: i32,
) -> Result<i32> {
    let length = u32::try_from(bytes.len()).map_err(|_| Errno::INVAL)?;
    let entry = opcode::Write::new(types::Fd(file.as_raw_fd()), bytes.as_ptr(), length)
        .offset(offset)
        .rw_flags(rw_flags)
        .build();
    submit(how, entry)
}

/// `IORING_OP_READ`.
pub fn uring_read(how: Uring, file: BorrowedFd<'_>, bytes: &mut [u8], offset: u64) -> Result<i32> {
    let length = u32::try_from(bytes.len()).map_err(|_| Errno::INVAL)?;
    let entry = opcode::Read::new(types::Fd(file.as_raw_fd()), bytes.as_mut_ptr(), length)
        .offset(offset)
        .build();
    submit(how, entry)
}

/// `IORING_OP_FALLOCATE`.
pub fn uring_fallocate(file: BorrowedFd<'_>, mode: i32, offset: u64, length: u64) -> Result<i32> {
    let entry = opcode::Fallocate::new(types::Fd(file.as_raw_fd()), length)
        .offset(offset)
        .mode(mode)
        .build();
    submit(Uring::Inline, entry)
}

/// `IORING_OP_FTRUNCATE`.
pub fn uring_ftruncate(file: BorrowedFd<'_>, size: u64) -> Result<i32> {
    let entry = opcode::Ftruncate::new(types::Fd(file.as_raw_fd()), size).build();
    submit(Uring::Inline, entry)
}

/// `IORING_OP_OPENAT`.
pub fn uring_open(how: Uring, path: &Path, flags: i32) -> Result<OwnedFd> {
    let path = c_path(path);
    let entry = opcode::OpenAt::new(types::Fd(libc::AT_FDCWD), path.as_ptr())
        .flags(flags | libc::O_CLOEXEC)
        .build();
    submit(how, entry).map(|fd| owned(fd.into()))
}
