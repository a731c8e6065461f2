//! Where files are until all of them are complete, and how they get their names.
//!
//! A conversion writes into a directory inside the target, beside a journal of what is finished. When
//! everything is, a marker tells readers to keep away, the files get their names, and the marker goes. So
//! the target is at every moment what it was before, refused, or complete.

use std::collections::BTreeSet;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use tensora_formats::UNFINISHED_NAME;

use crate::journal::{self, Fingerprint, Finished, Journal, Record};
use crate::target::{names, nearest_existing, or_current, refused, sync_directory};
use crate::{Error, Kept, Result, Unfinished};

/// Hidden, so that no reader takes it for a rank or a shard.
const DIRECTORY_NAME: &str = ".tensora-convert";
const JOURNAL_NAME: &str = "journal";

fn directory(target: &Path) -> PathBuf {
    target.join(DIRECTORY_NAME)
}

/// What an interrupted conversion left in `target`. Whether its files are still whole is not looked at.
pub(crate) fn kept(target: &Path) -> Result<Kept> {
    let record = journal::peek(&directory(target).join(JOURNAL_NAME))?.unwrap_or_default();
    Ok(Kept {
        files: record.finished.len(),
        bytes: record.finished.values().map(|file| file.bytes).sum(),
    })
}

/// Checks that what an interrupted conversion left in `target` does not forbid another. Returns whether
/// one is to be finished that has begun to put its files in place.
pub(crate) fn check(target: &Path, unfinished: Unfinished) -> Result<bool> {
    let directory = directory(target);
    if !exists(&directory)? {
        // Somebody removed the files, and not the marker.
        let marker = target.join(UNFINISHED_NAME);
        return match exists(&marker)? {
            true if unfinished != Unfinished::Discard => Err(Error::StrayMarker { path: marker }),
            _ => Ok(false),
        };
    }
    let record = journal::peek(&directory.join(JOURNAL_NAME))?.unwrap_or_default();
    match unfinished {
        Unfinished::Refuse => Err(Error::Interrupted {
            path: directory,
            files: record.finished.len(),
        }),
        Unfinished::Discard if record.is_committing => {
            Err(Error::OnlyToBeFinished { path: directory })
        }
        Unfinished::Discard => Ok(false),
        Unfinished::Resume => Ok(record.is_committing),
    }
}

/// Whether an interrupted conversion, or one under way, has left anything in `target`.
pub(crate) fn is_there(target: &Path) -> Result<bool> {
    exists(&directory(target))
}

fn exists(path: &Path) -> Result<bool> {
    match fs::symlink_metadata(path) {
        Ok(_) => Ok(true),
        Err(error)
            if matches!(
                error.kind(),
                io::ErrorKind::NotFound | io::ErrorKind::NotADirectory
            ) =>
        {
            Ok(false)
        }
        Err(error) => Err(refused(path, "access")(error)),
    }
}

/// The directory that a conversion writes into. Dropped before [`commit`](Self::commit) has begun, it
/// keeps what is finished, and removes what is not.
#[derive(Debug)]
pub(crate) struct Staging {
    target: PathBuf,
    directory: PathBuf,
    /// Directories above that did not exist before, outermost first.
    created: Vec<PathBuf>,
    progress: Mutex<Progress>,
}

#[derive(Debug)]
struct Progress {
    journal: Journal,
    record: Record,
}

impl Staging {
    /// Makes the directory, and those above it, or takes up what an interrupted conversion left.
    pub(crate) fn open(
        target: &Path,
        fingerprint: &Fingerprint,
        unfinished: Unfinished,
    ) -> Result<Self> {
        // Again, because another conversion may have begun since it was planned.
        check(target, unfinished)?;
        let mut created = Vec::new();
        let existing = nearest_existing(target)?;
        let mut missing: Vec<&Path> = target
            .ancestors()
            .take_while(|&ancestor| ancestor != existing && !ancestor.as_os_str().is_empty())
            .collect();
        missing.reverse();
        let staging = directory(target);
        for path in missing.into_iter().chain([&*staging]) {
            match fs::create_dir(path) {
                Ok(()) => created.push(path.to_owned()),
                // Somebody else was faster, or the path goes through `..`.
                Err(_) if path.is_dir() => {}
                Err(error) => {
                    remove_directories(&created);
                    return Err(refused(path, "create")(error));
                }
            }
        }
        let (mut journal, mut record) =
            Journal::open(&staging.join(JOURNAL_NAME)).inspect_err(|_| {
                remove_directories(&created);
            })?;
        let is_new = created.last() == Some(&staging);
        if !is_new {
            match unfinished {
                Unfinished::Refuse => {
                    return Err(Error::Interrupted {
                        path: staging,
                        files: record.finished.len(),
                    });
                }
                Unfinished::Resume => check_fingerprint(&staging, &record, fingerprint)?,
                Unfinished::Discard => record = Record::default(),
            }
        }
        created.retain(|path| *path != staging);
        record.fingerprint = Some(fingerprint.clone());
        journal.rewrite(fingerprint, &record)?;
        let staging = Self {
            target: target.to_owned(),
            directory: staging,
            created,
            progress: Mutex::new(Progress { journal, record }),
        };
        staging.remove_unfinished();
        mark(&staging.directory)?;
        sync_directory(&staging.directory)?;
        Ok(staging)
    }

    fn progress(&self) -> MutexGuard<'_, Progress> {
        self.progress.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether it has begun to give files their names, in this run or in an interrupted one.
    pub(crate) fn is_committing(&self) -> bool {
        self.progress().record.is_committing
    }

    pub(crate) fn directory(&self) -> &Path {
        &self.directory
    }

    /// Where a file is until it gets its name, in a directory that exists.
    pub(crate) fn path(&self, name: &str) -> Result<PathBuf> {
        let path = self.directory.join(name);
        create_parent(&self.directory, &path)?;
        Ok(path)
    }

    /// Where a file is that an interrupted conversion finished, according to the journal.
    pub(crate) fn finished(&self, name: &str) -> Option<(PathBuf, Finished)> {
        let progress = self.progress();
        let finished = *progress.record.finished.get(name)?;
        let staged = self.directory.join(name);
        // It may have got its name before the conversion was interrupted.
        let path = match progress.record.is_committing && !staged.is_file() {
            true => self.target.join(name),
            false => staged,
        };
        Some((path, finished))
    }

    /// Records that a file is complete, and safe on the device.
    pub(crate) fn finish(&self, name: &str, finished: Finished) -> Result<()> {
        // The name has to be as safe as the content.
        if let Some(parent) = self.directory.join(name).parent() {
            sync_directory(parent)?;
        }
        let mut progress = self.progress();
        progress.journal.finish(name, finished)?;
        progress.record.finished.insert(name.to_owned(), finished);
        Ok(())
    }

    /// Keeps nothing, because it is of no use to anybody. To be followed by dropping this.
    pub(crate) fn discard(&self) {
        self.progress().record.finished.clear();
    }

    /// Forgets a file that is not what the journal says, and removes it.
    pub(crate) fn forget(&self, name: &str) -> Result<()> {
        {
            let mut progress = self.progress();
            let Progress { journal, record } = &mut *progress;
            record.finished.remove(name);
            if let Some(fingerprint) = &record.fingerprint {
                journal.rewrite(fingerprint, record)?;
            }
        }
        remove(&self.directory.join(name))
    }

    /// Writes a small file of what `source` yields, safe on the device when this returns. The error names the
    /// file that could not be written.
    pub(crate) fn write_from(
        &self,
        name: &str,
        source: &mut dyn io::Read,
    ) -> std::result::Result<(), (PathBuf, io::Error)> {
        let path = self.directory.join(name);
        let written = create_parent(&self.directory, &path)
            .map_err(|error| io::Error::other(error.to_string()))
            .and_then(|()| {
                OpenOptions::new()
                    .write(true)
                    .create(true)
                    .truncate(true)
                    .open(&path)
            })
            .and_then(|mut file| {
                io::copy(source, &mut file)?;
                file.sync_all()
            });
        written.map_err(|error| (path, error))
    }

    /// Gives all files their names: `data` in that order, then `indexes`, each of which makes a checkpoint
    /// of what is beside it. `replaced` are files of the target that are to be gone.
    ///
    /// Interrupted, by an error or a crash, it is taken up where it was.
    pub(crate) fn commit(
        self,
        data: &[String],
        indexes: &[String],
        replaced: &[String],
    ) -> Result<()> {
        let directories: BTreeSet<PathBuf> = data
            .iter()
            .chain(indexes)
            .chain(replaced)
            .filter_map(|name| Some(self.target.join(Path::new(name).parent()?)))
            .chain([self.target.clone()])
            .collect();
        {
            let mut progress = self.progress();
            if !progress.record.is_committing {
                progress.journal.commit()?;
                progress.record.is_committing = true;
            }
        }
        for directory in &directories {
            create_parent(&self.target, &directory.join(UNFINISHED_NAME))?;
            mark(directory)?;
            sync_directory(directory)?;
        }
        // For readers that know nothing of the marker, as little as possible looks like a checkpoint.
        let is_old = |name: &&String| !data.contains(name);
        let mut stale: Vec<&String> = replaced.iter().filter(is_old).collect();
        stale.sort_by_key(|name| !name.ends_with(".json"));
        for name in stale {
            remove(&self.target.join(name))?;
        }
        for directory in &directories {
            sync_directory(directory)?;
        }
        for name in data {
            self.rename(name)?;
        }
        for directory in &directories {
            sync_directory(directory)?;
        }
        for name in indexes {
            self.rename(name)?;
        }
        // The root comes first in this order, and loses its marker last.
        for directory in directories.iter().rev() {
            sync_directory(directory)?;
            remove(&directory.join(UNFINISHED_NAME))?;
            sync_directory(directory)?;
            // Of ranks that there are no more.
            if *directory != self.target {
                let _ = fs::remove_dir(directory);
            }
        }
        sync_directory(&self.target)?;
        for parent in self.created.iter().filter_map(|path| path.parent()) {
            sync_directory(or_current(parent))?;
        }
        self.remove_all();
        Ok(())
    }

    /// Gives a file its name, unless it got it before the conversion was interrupted.
    fn rename(&self, name: &str) -> Result<()> {
        let (staged, path) = (self.directory.join(name), self.target.join(name));
        match fs::rename(&staged, &path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound && path.is_file() => Ok(()),
            renamed => renamed.map_err(refused(&path, "rename a temporary file to")),
        }
    }

    /// Removes every file that is not finished. What cannot be removed now is overwritten later.
    fn remove_unfinished(&self) {
        let progress = self.progress();
        let mut directories = vec![String::new()];
        while let Some(prefix) = directories.pop() {
            for name in names(&self.directory.join(&prefix)).unwrap_or_default() {
                let name = format!("{prefix}{name}");
                let path = self.directory.join(&name);
                if path.is_dir() {
                    directories.push(format!("{name}/"));
                } else if name != JOURNAL_NAME && !progress.record.finished.contains_key(&name) {
                    warn(fs::remove_file(&path), &path);
                }
            }
        }
    }

    /// Removes the directory and all that is in it; the journal last, because it says what there is.
    fn remove_all(&self) {
        let journal = self.directory.join(JOURNAL_NAME);
        for name in names(&self.directory).unwrap_or_default() {
            let path = self.directory.join(&name);
            if path.is_dir() {
                warn(fs::remove_dir_all(&path), &path);
            } else if path != journal {
                warn(fs::remove_file(&path), &path);
            }
        }
        warn(fs::remove_file(&journal), &journal);
        warn(fs::remove_dir(&self.directory), &self.directory);
    }
}

impl Drop for Staging {
    fn drop(&mut self) {
        let (is_committing, is_empty) = {
            let progress = self.progress();
            (
                progress.record.is_committing,
                progress.record.finished.is_empty(),
            )
        };
        // Then either all is done, or the files are what the journal says.
        if is_committing {
            return;
        }
        if is_empty {
            self.remove_all();
            remove_directories(&self.created);
        } else {
            self.remove_unfinished();
        }
    }
}

fn check_fingerprint(staging: &Path, record: &Record, fingerprint: &Fingerprint) -> Result<()> {
    let what = match &record.fingerprint {
        // Interrupted before anything was written.
        None => return Ok(()),
        Some(found) if found.source != fingerprint.source => {
            "it was a conversion of another source, or the source has changed since"
        }
        Some(found) if found.target != fingerprint.target => {
            "it was a conversion to another format or with other options"
        }
        Some(_) => return Ok(()),
    };
    Err(Error::CannotResume {
        path: staging.to_owned(),
        what,
    })
}

/// Tells readers that this directory is not complete.
fn mark(directory: &Path) -> Result<()> {
    let path = directory.join(UNFINISHED_NAME);
    let text = "A conversion has not put all of its files in place here; `tensora convert` with --resume does.\n";
    File::create(&path)
        .and_then(|mut file| {
            file.write_all(text.as_bytes())?;
            file.sync_all()
        })
        .map_err(refused(&path, "create"))
}

/// Removes a file that may be gone already.
fn remove(path: &Path) -> Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        removed => removed.map_err(refused(path, "remove")),
    }
}

/// Creates the directory that `path`, at most one level below `root`, is in.
fn create_parent(root: &Path, path: &Path) -> Result<()> {
    match path.parent() {
        Some(parent) if parent != root => match fs::create_dir(parent) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
                Err(refused(parent, "create")(error))
            }
            _ => sync_directory(root),
        },
        _ => Ok(()),
    }
}

fn remove_directories(created: &[PathBuf]) {
    for path in created.iter().rev() {
        // Somebody else's files may be in it by now; then it stays.
        let _ = fs::remove_dir(path);
    }
}

fn warn(removed: io::Result<()>, path: &Path) {
    match removed {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            tracing::warn!(path = %path.display(), %error, "could not remove a temporary file");
        }
        _ => {}
    }
}
