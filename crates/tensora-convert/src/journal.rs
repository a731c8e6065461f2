//! What an interrupted conversion leaves to be resumed: which files are finished, and what of.

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::target::refused;
use crate::{Digest, Error, Result};

/// Changed when a journal could be misunderstood.
const VERSION: u32 = 1;
/// Far more than the files of any checkpoint take.
const LIMIT_BYTES: u64 = 64 << 20;

/// What a conversion is of and to, so that another one is not taken for it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Fingerprint {
    /// Of the names, lengths and times of the source's files.
    pub(crate) source: String,
    /// Of every byte of the target that is not tensor data, and of the place of all that is.
    pub(crate) target: String,
}

/// A file that is complete and safe on the device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Finished {
    pub(crate) bytes: u64,
    /// The BLAKE3 of the whole file.
    pub(crate) digest: Digest,
}

/// A line of the journal.
#[derive(Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "kebab-case")]
enum Event {
    Begun {
        version: u32,
        #[serde(flatten)]
        fingerprint: Fingerprint,
    },
    Finished {
        file: String,
        bytes: u64,
        blake3: String,
    },
    /// From here on files get their names, and the conversion can only be finished.
    Committing,
}

/// What a journal says.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Record {
    /// `None` when not even the first line was written, or one of another version.
    pub(crate) fingerprint: Option<Fingerprint>,
    pub(crate) finished: BTreeMap<String, Finished>,
    pub(crate) is_committing: bool,
}

impl Record {
    /// Reads the lines up to the first that is not whole, which is where the writer was killed.
    fn parse(text: &[u8]) -> Self {
        let mut record = Self::default();
        for line in text.split_inclusive(|&byte| byte == b'\n') {
            let event = line.strip_suffix(b"\n").map(serde_json::from_slice);
            match event {
                Some(Ok(Event::Begun {
                    version: VERSION,
                    fingerprint,
                })) => record.fingerprint = Some(fingerprint),
                Some(Ok(Event::Finished {
                    file,
                    bytes,
                    blake3,
                })) if record.fingerprint.is_some() => {
                    let Ok(digest) = blake3.parse() else { break };
                    record.finished.insert(file, Finished { bytes, digest });
                }
                Some(Ok(Event::Committing)) if record.fingerprint.is_some() => {
                    record.is_committing = true;
                }
                _ => break,
            }
        }
        record
    }
}

/// The journal of a conversion under way. Holds a lock on it until dropped.
#[derive(Debug)]
pub(crate) struct Journal {
    path: PathBuf,
    file: File,
}

impl Journal {
    /// Opens the journal, or makes an empty one, and locks it.
    ///
    /// # Errors
    ///
    /// [`Error::TargetBusy`] while another conversion has it.
    pub(crate) fn open(path: &Path) -> Result<(Self, Record)> {
        let mut file = OpenOptions::new()
            .read(true)
            .append(true)
            .create(true)
            .open(path)
            .map_err(refused(path, "open"))?;
        lock(path, &file)?;
        let record = read(path, &mut file)?;
        let journal = Self {
            path: path.to_owned(),
            file,
        };
        Ok((journal, record))
    }

    /// Forgets everything, and begins with `fingerprint`.
    pub(crate) fn begin(&mut self, fingerprint: &Fingerprint) -> Result<()> {
        self.file
            .set_len(0)
            .map_err(refused(&self.path, "truncate"))?;
        self.append(&Event::Begun {
            version: VERSION,
            fingerprint: fingerprint.clone(),
        })
    }

    /// Forgets what a killed writer wrote of a last line, and what is no longer so.
    pub(crate) fn rewrite(&mut self, fingerprint: &Fingerprint, record: &Record) -> Result<()> {
        self.begin(fingerprint)?;
        for (file, finished) in &record.finished {
            self.finish(file, *finished)?;
        }
        match record.is_committing {
            true => self.commit(),
            false => Ok(()),
        }
    }

    pub(crate) fn finish(&mut self, file: &str, finished: Finished) -> Result<()> {
        self.append(&Event::Finished {
            file: file.to_owned(),
            bytes: finished.bytes,
            blake3: finished.digest.to_string(),
        })
    }

    pub(crate) fn commit(&mut self) -> Result<()> {
        self.append(&Event::Committing)
    }

    /// Adds a line, safe on the device when this returns.
    fn append(&mut self, event: &Event) -> Result<()> {
        let line = serde_json::to_vec(event).map_err(io::Error::from);
        line.and_then(|mut line| {
            line.push(b'\n');
            // In one piece, so that only a crash of the system can tear it.
            self.file.write_all(&line)?;
            self.file.sync_data()
        })
        .map_err(refused(&self.path, "write"))
    }
}

/// What the journal at `path` says, without taking it. `None` if there is none.
pub(crate) fn peek(path: &Path) -> Result<Option<Record>> {
    let mut file = match File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(refused(path, "open")(error)),
    };
    read(path, &mut file).map(Some)
}

fn read(path: &Path, file: &mut File) -> Result<Record> {
    let mut text = Vec::new();
    file.take(LIMIT_BYTES)
        .read_to_end(&mut text)
        .map_err(refused(path, "read"))?;
    Ok(Record::parse(&text))
}

#[cfg(unix)]
fn lock(path: &Path, file: &File) -> Result<()> {
    use rustix::fs::{FlockOperation, flock};
    match flock(file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(()),
        Err(rustix::io::Errno::WOULDBLOCK) => Err(Error::TargetBusy {
            path: path.to_owned(),
        }),
        // Some network file systems have no locks. The journal is then as good as it is without one.
        Err(error) => {
            tracing::debug!(path = %path.display(), %error, "the journal could not be locked");
            Ok(())
        }
    }
}

#[cfg(not(unix))]
fn lock(_path: &Path, _file: &File) -> Result<()> {
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn fingerprint() -> Fingerprint {
        Fingerprint {
            source: "s".to_owned(),
            target: "t".to_owned(),
        }
    }

    fn finished(bytes: u64) -> Finished {
        let digest = Digest::from_bytes([u8::try_from(bytes % 251).unwrap(); 32]);
        Finished { bytes, digest }
    }

    #[test]
    fn what_was_written_is_read() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("journal");
        assert_eq!(peek(&path).unwrap(), None);
        let (mut journal, record) = Journal::open(&path).unwrap();
        assert_eq!(record, Record::default());
        journal.begin(&fingerprint()).unwrap();
        journal.finish("rank_0/tensor.data_0", finished(7)).unwrap();
        journal.commit().unwrap();
        let expected = Record {
            fingerprint: Some(fingerprint()),
            finished: [("rank_0/tensor.data_0".to_owned(), finished(7))].into(),
            is_committing: true,
        };
        assert_eq!(peek(&path).unwrap(), Some(expected.clone()));
        journal.rewrite(&fingerprint(), &expected).unwrap();
        assert_eq!(peek(&path).unwrap(), Some(expected));
    }

    #[cfg(unix)]
    #[test]
    fn only_one_conversion_has_it() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("journal");
        let (journal, _) = Journal::open(&path).unwrap();
        let error = Journal::open(&path).unwrap_err();
        assert!(matches!(error, Error::TargetBusy { .. }), "{error:?}");
        drop(journal);
        Journal::open(&path).unwrap();
    }

    proptest! {
        /// However much of a journal reached the device, what is read of it is true.
        #[test]
        fn a_torn_journal_says_less_and_nothing_else(files in 0u64..6, cut in 0usize..1000) {
            let directory = tempfile::tempdir().unwrap();
            let path = directory.path().join("journal");
            let (mut journal, _) = Journal::open(&path).unwrap();
            journal.begin(&fingerprint()).unwrap();
            for number in 0..files {
                journal.finish(&format!("f{number}"), finished(number)).unwrap();
            }
            journal.commit().unwrap();
            let text = std::fs::read(&path).unwrap();
            let record = Record::parse(&text[..cut.min(text.len())]);
            for (name, file) in &record.finished {
                prop_assert_eq!(name, &format!("f{}", file.bytes));
                prop_assert_eq!(*file, finished(file.bytes));
            }
            prop_assert!(record.finished.is_empty() || record.fingerprint.is_some());
            prop_assert!(!record.is_committing || cut >= text.len());
            let lines = text[..cut.min(text.len())].split(|&byte| byte == b'\n').count() - 1;
            let found = usize::from(record.fingerprint.is_some())
                + record.finished.len() + usize::from(record.is_committing);
            prop_assert_eq!(found, lines);
        }
    }
}
