//! What an interrupted conversion leaves to be resumed: which files are finished, and what of.

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
#[cfg(unix)]
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use crate::target::refused;
use crate::{Digest, Error, Result};

/// Changed when a journal could be misunderstood.
const VERSION: u32 = 1;
/// Far more than the files of any checkpoint take.
const LIMIT_BYTES: u64 = 64 << 20;
/// How long is waited for those who only look whether a journal is free. Each takes some microseconds.
#[cfg(unix)]
const PATIENCE: Duration = Duration::from_secs(1);

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
    /// What was finished is not what it was, and is written again.
    Forgotten { file: String },
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
    /// Whether another version of this program wrote it.
    pub(crate) is_foreign: bool,
    /// The length of the lines that were read, in bytes. What follows was not written to its end.
    read_bytes: u64,
}

impl Record {
    /// Whether there is nothing in it.
    pub(crate) fn is_empty(&self) -> bool {
        self.fingerprint.is_none() && !self.is_foreign
    }

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
                Some(Ok(Event::Begun { .. })) => {
                    record.is_foreign = true;
                    break;
                }
                Some(Ok(Event::Finished {
                    file,
                    bytes,
                    blake3,
                })) if record.fingerprint.is_some() => {
                    let Ok(digest) = blake3.parse() else { break };
                    record.finished.insert(file, Finished { bytes, digest });
                }
                Some(Ok(Event::Forgotten { file })) if record.fingerprint.is_some() => {
                    record.finished.remove(&file);
                }
                Some(Ok(Event::Committing)) if record.fingerprint.is_some() => {
                    record.is_committing = true;
                }
                _ => break,
            }
            record.read_bytes += line.len() as u64;
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
    /// [`Error::TargetBusy`] while another conversion has it; [`Error::NotStaging`] when it is no file.
    pub(crate) fn open(path: &Path) -> Result<(Self, Record)> {
        let mut options = OpenOptions::new();
        options.read(true).append(true).create(true);
        let mut file = open_regular(path, &mut options)?;
        lock(path, &file)?;
        let record = read(path, &mut file)?;
        let journal = Self {
            path: path.to_owned(),
            file,
        };
        Ok((journal, record))
    }

    /// Goes on behind what was read of it: cuts off the line in which its writer was killed.
    pub(crate) fn resume(&mut self, record: &Record) -> Result<()> {
        self.file
            .set_len(record.read_bytes)
            .map_err(refused(&self.path, "truncate"))
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

    pub(crate) fn finish(&mut self, file: &str, finished: Finished) -> Result<()> {
        self.append(&Event::Finished {
            file: file.to_owned(),
            bytes: finished.bytes,
            blake3: finished.digest.to_string(),
        })
    }

    pub(crate) fn forget(&mut self, file: &str) -> Result<()> {
        self.append(&Event::Forgotten {
            file: file.to_owned(),
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
    match fs::symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(refused(path, "access")(error)),
        Ok(_) => {}
    }
    let mut file = open_regular(path, OpenOptions::new().read(true))?;
    read(path, &mut file).map(Some)
}

/// Checks that no conversion under way has the journal.
pub(crate) fn check_free(path: &Path) -> Result<()> {
    #[cfg(unix)]
    {
        use rustix::fs::{FlockOperation, flock};
        let file = open_regular(path, OpenOptions::new().read(true))?;
        // For the moment that this file is open. Whoever has begun has the lock already; whoever begins now waits.
        let locked = flock(&file, FlockOperation::NonBlockingLockShared);
        if locked == Err(rustix::io::Errno::WOULDBLOCK) {
            return Err(Error::TargetBusy {
                path: path.to_owned(),
            });
        }
    }
    #[cfg(not(unix))]
    let _ = path;
    Ok(())
}

/// Opens a file, but not through a symbolic link, and nothing that is no file.
fn open_regular(path: &Path, options: &mut OpenOptions) -> Result<File> {
    #[cfg(unix)]
    {
        use rustix::fs::OFlags;
        use std::os::unix::fs::OpenOptionsExt;
        // A pipe must not block, and somebody else's file behind a link must not be written to.
        let flags = OFlags::NOFOLLOW | OFlags::NONBLOCK;
        options.custom_flags(flags.bits().cast_signed());
    }
    let file = options.open(path).map_err(refused(path, "open"))?;
    let metadata = file.metadata().map_err(refused(path, "access"))?;
    match metadata.is_file() {
        true => Ok(file),
        false => Err(Error::NotStaging {
            path: path.to_owned(),
            what: "is not a regular file",
        }),
    }
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
    use rustix::io::Errno;
    let busy = || {
        Err(Error::TargetBusy {
            path: path.to_owned(),
        })
    };
    let begun = Instant::now();
    loop {
        match flock(file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) if is_at(path, file) => return Ok(()),
            // Whoever had it before may have finished, and removed it.
            Ok(()) => return busy(),
            Err(Errno::WOULDBLOCK) => {}
            // Some network file systems have no locks. The journal is then as good as it is without one.
            Err(error) => {
                tracing::warn!(
                    path = %path.display(), %error,
                    "the journal could not be locked: nothing keeps two conversions into one target apart"
                );
                return Ok(());
            }
        }
        // A conversion has it alone. Who only looks shares it, and is about to let it go.
        let is_shared = flock(file, FlockOperation::NonBlockingLockShared).is_ok();
        if !is_shared || begun.elapsed() > PATIENCE {
            return busy();
        }
        flock(file, FlockOperation::Unlock)
            .map_err(|errno| refused(path, "unlock")(errno.into()))?;
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// Whether this is the file that the path leads to now.
#[cfg(unix)]
fn is_at(path: &Path, file: &File) -> bool {
    use std::os::unix::fs::MetadataExt;
    match (fs::symlink_metadata(path), file.metadata()) {
        (Ok(there), Ok(here)) => (there.dev(), there.ino()) == (here.dev(), here.ino()),
        _ => false,
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
            is_foreign: false,
            read_bytes: std::fs::metadata(&path).unwrap().len(),
        };
        assert_eq!(peek(&path).unwrap(), Some(expected));
        journal.forget("rank_0/tensor.data_0").unwrap();
        assert_eq!(peek(&path).unwrap().unwrap().finished, BTreeMap::new());
    }

    #[test]
    fn a_torn_line_is_cut_off_before_the_next_is_written() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("journal");
        let (mut journal, _) = Journal::open(&path).unwrap();
        journal.begin(&fingerprint()).unwrap();
        journal.finish("a", finished(1)).unwrap();
        drop(journal);
        let mut text = std::fs::read(&path).unwrap();
        text.truncate(text.len() - 3);
        std::fs::write(&path, text).unwrap();
        let (mut journal, record) = Journal::open(&path).unwrap();
        journal.resume(&record).unwrap();
        journal.finish("b", finished(2)).unwrap();
        let finished: Vec<String> = peek(&path).unwrap().unwrap().finished.into_keys().collect();
        assert_eq!(finished, ["b"]);
    }

    #[test]
    fn the_journal_of_another_version_is_known_as_such() {
        let line = b"{\"event\":\"begun\",\"version\":99,\"source\":\"s\",\"target\":\"t\"}\n";
        let record = Record::parse(line);
        assert!(record.is_foreign && record.fingerprint.is_none());
    }

    #[cfg(unix)]
    #[test]
    fn what_is_no_file_is_no_journal() {
        let directory = tempfile::tempdir().unwrap();
        let other = directory.path().join("other");
        std::fs::write(&other, "somebody else's").unwrap();
        let path = directory.path().join("journal");
        std::os::unix::fs::symlink(&other, &path).unwrap();
        Journal::open(&path).unwrap_err();
        peek(&path).unwrap_err();
        std::fs::remove_file(&path).unwrap();
        rustix::fs::mknodat(
            rustix::fs::CWD,
            &path,
            rustix::fs::FileType::Fifo,
            rustix::fs::Mode::RUSR | rustix::fs::Mode::WUSR,
            0,
        )
        .unwrap();
        let error = Journal::open(&path).unwrap_err();
        assert!(matches!(error, Error::NotStaging { .. }), "{error}");
        assert_eq!(std::fs::read_to_string(&other).unwrap(), "somebody else's");
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

    #[cfg(unix)]
    #[test]
    fn who_only_looks_stands_in_nobodys_way() {
        use rustix::fs::{FlockOperation, flock};
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("journal");
        std::fs::write(&path, "").unwrap();
        // As `check_free` does, for longer.
        let looking = File::open(&path).unwrap();
        flock(&looking, FlockOperation::NonBlockingLockShared).unwrap();
        let (journal, _) = std::thread::scope(|scope| {
            let looks = scope.spawn(move || {
                std::thread::sleep(Duration::from_millis(100));
                drop(looking);
            });
            let opened = Journal::open(&path);
            looks.join().unwrap();
            opened.unwrap()
        });
        // A conversion is not waited for.
        let begun = Instant::now();
        for error in [
            check_free(&path).unwrap_err(),
            Journal::open(&path).unwrap_err(),
        ] {
            assert!(matches!(error, Error::TargetBusy { .. }), "{error:?}");
        }
        assert!(begun.elapsed() < PATIENCE);
        drop(journal);
        check_free(&path).unwrap();
        // Nor is a look that never ends.
        let looking = File::open(&path).unwrap();
        flock(&looking, FlockOperation::NonBlockingLockShared).unwrap();
        let error = Journal::open(&path).unwrap_err();
        assert!(matches!(error, Error::TargetBusy { .. }), "{error:?}");
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
            prop_assert!(record.read_bytes <= cut.min(text.len()) as u64);
            let found = usize::from(record.fingerprint.is_some())
                + record.finished.len() + usize::from(record.is_committing);
            prop_assert_eq!(found, lines);
        }
    }
}
