//! Messages between the task and the machine: a byte that says which, the
//! length of the rest as four bytes, little-endian, and the rest.

use std::collections::VecDeque;
use std::ffi::{OsStr, OsString};
use std::io::{Error, ErrorKind, Result};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::PathBuf;

/// What is run in the machine.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Program {
    /// Where it runs.
    pub directory: PathBuf,
    /// Its name, looked up in its `PATH`, and its arguments.
    pub words: Vec<OsString>,
    /// The whole of its environment.
    pub environment: Vec<(OsString, OsString)>,
}

/// A message. Which way it goes is said with each.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Message {
    /// From the machine: programs can run.
    Ready,
    /// From the machine: it cannot get ready, and why.
    Failed(String),
    /// To the machine: run this, beside what already runs.
    Run(Program),
    /// From the machine: written by a program to its standard output.
    Out(Vec<u8>),
    /// From the machine: written by a program to its standard error.
    Err(Vec<u8>),
    /// From the machine: the program told to run last has ended, and
    /// everything it wrote was sent before this. Its exit status, or 128 and
    /// the signal that ended it.
    Exited(u8),
    /// From the machine: the program told to run last could not be started:
    /// the errno.
    NotStarted(i32),
    /// To the machine: end every program and unmount every disk.
    Finish,
    /// From the machine: that is done, it can be switched off.
    Finished,
}

/// Longer than any message.
const TOO_LONG: usize = 16 << 20;

const HEADER: usize = 5;

impl Message {
    /// It as bytes.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let (kind, rest) = match self {
            Self::Ready => (0, Vec::new()),
            Self::Failed(why) => (1, why.clone().into_bytes()),
            Self::Run(program) => (2, encode_program(program)),
            Self::Out(bytes) => (3, bytes.clone()),
            Self::Err(bytes) => (4, bytes.clone()),
            Self::Exited(status) => (5, vec![*status]),
            Self::NotStarted(errno) => (6, errno.to_le_bytes().to_vec()),
            Self::Finish => (7, Vec::new()),
            Self::Finished => (8, Vec::new()),
        };
        let mut bytes = vec![kind];
        bytes.extend(length(rest.len()));
        bytes.extend(rest);
        bytes
    }

    fn decode(kind: u8, rest: &[u8]) -> Result<Self> {
        let message = match (kind, rest) {
            (0, []) => Self::Ready,
            (1, why) => Self::Failed(String::from_utf8_lossy(why).into_owned()),
            (2, program) => Self::Run(decode_program(program)?),
            (3, bytes) => Self::Out(bytes.to_vec()),
            (4, bytes) => Self::Err(bytes.to_vec()),
            (5, [status]) => Self::Exited(*status),
            (6, [a, b, c, d]) => Self::NotStarted(i32::from_le_bytes([*a, *b, *c, *d])),
            (7, []) => Self::Finish,
            (8, []) => Self::Finished,
            _ => return Err(malformed()),
        };
        Ok(message)
    }
}

fn malformed() -> Error {
    Error::new(ErrorKind::InvalidData, "a message that makes no sense")
}

/// Lengths are those of what fits into a message; a longer one is caught by
/// whoever decodes it.
fn length(length: usize) -> [u8; 4] {
    u32::try_from(length).unwrap_or(u32::MAX).to_le_bytes()
}

fn encode_program(program: &Program) -> Vec<u8> {
    let mut bytes = Vec::new();
    let mut put = |text: &OsStr| {
        bytes.extend(length(text.len()));
        bytes.extend(text.as_bytes());
    };
    put(program.directory.as_os_str());
    // The words end where the pairs begin: an empty text between them would
    // be an empty argument, so their number comes first.
    put(OsStr::new(&program.words.len().to_string()));
    program.words.iter().for_each(|word| put(word));
    for (name, value) in &program.environment {
        put(name);
        put(value);
    }
    bytes
}

fn decode_program(bytes: &[u8]) -> Result<Program> {
    let mut texts = VecDeque::new();
    let mut rest = bytes;
    while !rest.is_empty() {
        let (length, behind) = rest.split_first_chunk::<4>().ok_or_else(malformed)?;
        let length = u32::from_le_bytes(*length) as usize;
        let (text, behind) = behind.split_at_checked(length).ok_or_else(malformed)?;
        texts.push_back(OsString::from_vec(text.to_vec()));
        rest = behind;
    }
    let mut take = || texts.pop_front().ok_or_else(malformed);
    let directory = take()?.into();
    let count = take()?;
    let count: usize = count
        .to_str()
        .and_then(|count| count.parse().ok())
        .ok_or_else(malformed)?;
    let words = (0..count).map(|_| take()).collect::<Result<_>>()?;
    let mut environment = Vec::new();
    while let Ok(name) = take() {
        environment.push((name, take()?));
    }
    Ok(Program {
        directory,
        words,
        environment,
    })
}

/// Puts messages together from bytes that come in pieces.
#[derive(Debug, Default)]
pub struct Decoder {
    bytes: Vec<u8>,
}

impl Decoder {
    /// Takes the next piece.
    pub fn push(&mut self, piece: &[u8]) {
        self.bytes.extend_from_slice(piece);
    }

    /// The next message, if the whole of it is there.
    ///
    /// # Errors
    ///
    /// `InvalidData` for what is no message.
    pub fn take(&mut self) -> Result<Option<Message>> {
        let Some((header, behind)) = self.bytes.split_first_chunk::<HEADER>() else {
            return Ok(None);
        };
        let [kind, length @ ..] = *header;
        let length = u32::from_le_bytes(length) as usize;
        if length > TOO_LONG {
            return Err(malformed());
        }
        let Some(rest) = behind.get(..length) else {
            return Ok(None);
        };
        let message = Message::decode(kind, rest)?;
        self.bytes.drain(..HEADER + length);
        Ok(Some(message))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn all() -> Vec<Message> {
        vec![
            Message::Ready,
            Message::Failed(String::from("no root")),
            Message::Run(Program {
                directory: "/tmp".into(),
                words: vec!["sh".into(), "".into(), "-c".into()],
                environment: vec![("A".into(), "".into()), ("".into(), "b".into())],
            }),
            Message::Run(Program::default()),
            Message::Out(vec![0; 70_000]),
            Message::Err(Vec::new()),
            Message::Exited(255),
            Message::NotStarted(-2),
            Message::Finish,
            Message::Finished,
        ]
    }

    #[test]
    fn what_is_encoded_is_decoded() {
        let bytes: Vec<u8> = all().iter().flat_map(Message::encode).collect();
        for size in [1, 3, 4096, bytes.len()] {
            let mut decoder = Decoder::default();
            let mut decoded = Vec::new();
            for piece in bytes.chunks(size) {
                decoder.push(piece);
                while let Some(message) = decoder.take().unwrap() {
                    decoded.push(message);
                }
            }
            assert_eq!(decoded, all());
        }
    }

    #[test]
    fn nonsense_is_an_error() {
        for bytes in [
            &[9, 0, 0, 0, 0][..],
            &[0, 1, 0, 0, 0, 0],
            &[5, 2, 0, 0, 0, 1, 2],
            &[3, 255, 255, 255, 255],
            // A program whose directory is longer than all of it.
            &[2, 5, 0, 0, 0, 9, 0, 0, 0, b'/'],
            // One that says it has words and has none.
            &[2, 10, 0, 0, 0, 1, 0, 0, 0, b'/', 1, 0, 0, 0, b'2'],
        ] {
            let mut decoder = Decoder::default();
            decoder.push(bytes);
            assert!(decoder.take().is_err(), "{bytes:?}");
        }
    }
}
