//! Members as processes: what they read and do, and how a test starts, watches and stops them.
#![allow(
    clippy::unwrap_used,
    clippy::cast_possible_truncation,
    clippy::needless_pass_by_value
)]

use std::collections::VecDeque;
use std::fmt::Write as _;
use std::io::{BufRead, BufReader, Read, Write};
use std::ops::Range;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use rustix::net::{AddressFamily, SocketAddrUnix, SocketType};
use rustix::process::{Pid, Signal, kill_process};
use tensora_io::{
    Backend, BackendKind, CancelToken, Control, DirectPolicy, Error, FilledWindow, RankSet,
    ReadExtent, ReadRequest, ReadStats, ReadWindow, ResidentPolicy, Result, SharedOptions,
    SharedRole, SharedStream, SharedWindow, SourceFile, StreamParams, TransferParams,
};

const FILES: usize = 3;
const WINDOWS: usize = 40;
const PATIENCE: Duration = Duration::from_secs(60);

/// xorshift64*.
#[derive(Clone, Debug)]
pub(crate) struct Rng(u64);

impl Rng {
    pub(crate) fn new(seed: u64) -> Self {
        let mut rng = Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1);
        (0..8).for_each(|_| _ = rng.next());
        rng
    }

    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    pub(crate) fn below(&mut self, limit: u64) -> u64 {
        (self.next() >> 11) % limit
    }
}

/// What the file of a number holds at an offset.
fn byte(file: usize, offset: u64) -> u8 {
    let word = (offset / 8 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15 ^ (file as u64) << 7);
    (word ^ word >> 29).to_le_bytes()[(offset % 8) as usize]
}

fn file_len(file: usize) -> u64 {
    700_001 + 4096 * file as u64
}

/// What a group reads, and what its members do: everything that a member process is told.
#[derive(Clone, Debug)]
pub(crate) struct Plan {
    settings: Vec<(&'static str, String)>,
}

static GROUPS: AtomicU64 = AtomicU64::new(0);

impl Plan {
    pub(crate) fn new(seed: u64, world: u32) -> Self {
        let number = GROUPS.fetch_add(1, Ordering::Relaxed);
        let plan = Self {
            settings: Vec::new(),
        };
        plan.with("name", format!("test-{}-{number}", std::process::id()))
            .seed(seed)
            .world(world)
            .fingerprint("same")
            .backend("sync")
            .join_ms(20_000)
            .silence_ms(5_000)
            .lease_ms(20_000)
            .buffers(6)
            .readers(2)
    }

    fn with(mut self, key: &'static str, value: impl ToString) -> Self {
        self.settings.retain(|(known, _)| *known != key);
        self.settings.push((key, value.to_string()));
        self
    }

    fn from_env() -> Self {
        let text = std::env::var("TENSORA_SHARED_MEMBER").expect("run by the other tests");
        let settings = text.split(';').filter_map(|setting| {
            let (key, value) = setting.split_once('=')?;
            Some((&*key.to_owned().leak(), value.to_owned()))
        });
        Self {
            settings: settings.collect(),
        }
    }

    fn to_env(&self) -> String {
        self.settings
            .iter()
            .fold(String::new(), |mut text, (key, value)| {
                write!(text, "{key}={value};").unwrap();
                text
            })
    }

    fn get(&self, key: &str) -> Option<&str> {
        let setting = self.settings.iter().find(|(known, _)| *known == key);
        setting.map(|(_, value)| value.as_str())
    }

    fn number(&self, key: &str) -> u64 {
        self.get(key).map_or(0, |value| value.parse().unwrap())
    }

    /// Whether this rank does something at a window.
    fn at(&self, key: &str, rank: u64) -> Option<usize> {
        let (whose, window) = self.get(key)?.split_once(':')?;
        (whose == rank.to_string() || whose == "*").then(|| window.parse().unwrap())
    }

    pub(crate) fn name(&self) -> &str {
        self.get("name").unwrap()
    }

    pub(crate) fn windows(&self) -> Vec<SharedWindow> {
        let mut rng = Rng::new(self.number("seed"));
        let world = u32::try_from(self.number("world")).unwrap();
        let everyone = self.get("everyone").is_some();
        (0..WINDOWS)
            .map(|number| {
                let mut extents = Vec::new();
                let mut at = 0_u64;
                // One of no bytes among them.
                let count = if number == 5 { 0 } else { 1 + rng.below(3) };
                for _ in 0..count {
                    let file = rng.below(FILES as u64) as usize;
                    let start = rng.below(file_len(file));
                    let end = file_len(file).min(start + 1 + rng.below(20_000));
                    at = at.next_multiple_of(4096) + start % 4096;
                    extents.push(ReadExtent {
                        file,
                        range: start..end,
                        at: at as usize,
                    });
                    at += end - start;
                }
                let mut wanted: RankSet = (0..world)
                    .filter(|_| everyone || rng.below(3) > 0)
                    .collect();
                if self.get("early").is_some() && number >= 8 {
                    wanted = wanted.iter().filter(|&rank| rank + 1 == world).collect();
                    wanted.insert(world - 1);
                }
                if number % 10 != 7 && wanted.is_empty() {
                    wanted.insert(number as u32 % world);
                }
                let window = ReadWindow {
                    extents,
                    buffer_bytes: at as usize,
                };
                SharedWindow { window, wanted }
            })
            .collect()
    }
}

macro_rules! settings {
    ($($name:ident: $kind:ty),*) => {
        impl Plan {
            $(pub(crate) fn $name(self, value: $kind) -> Self { self.with(stringify!($name), value) })*
        }
    };
}
settings!(seed: u64, world: u32, fingerprint: &str, backend: &str, join_ms: u64, silence_ms: u64, lease_ms: u64,
    buffers: u32, readers: u32, delay_ms: u64, consume_ms: u64);

impl Plan {
    /// All but the last rank want the first 8 windows at most.
    pub(crate) fn early(self) -> Self {
        self.with("early", 1)
    }

    pub(crate) fn everyone(self) -> Self {
        self.with("everyone", 1)
    }

    /// This rank never comes back from reading this window or one after it.
    pub(crate) fn hang(self, rank: u32, window: usize) -> Self {
        self.with("hang", format!("{rank}:{window}"))
    }

    /// This rank holds this window, and those that it can get besides, until it is told to go on.
    pub(crate) fn hold(self, rank: u32, window: usize) -> Self {
        self.with("hold", format!("{rank}:{window}"))
    }

    /// Nobody can read this window.
    pub(crate) fn fail(self, window: usize) -> Self {
        self.with("fail", format!("*:{window}"))
    }

    /// This rank panics as it reads this window or one after it.
    pub(crate) fn panic(self, rank: u32, window: usize) -> Self {
        self.with("panic", format!("{rank}:{window}"))
    }

    /// This rank is cancelled as it reads this window or one after it.
    pub(crate) fn cancel(self, rank: u32, window: usize) -> Self {
        self.with("cancel", format!("{rank}:{window}"))
    }
}

/// Reads as told, and misbehaves as told.
#[derive(Debug)]
struct Misbehaving {
    backend: Box<dyn Backend>,
    plan: Plan,
    rank: u64,
    windows: Vec<ReadWindow>,
    cancel: CancelToken,
    calls: AtomicU64,
}

impl Misbehaving {
    /// Which window this is.
    fn window(&self, requests: &[ReadRequest<'_>]) -> usize {
        let same = |window: &ReadWindow| {
            window.extents.len() == requests.len()
                && window
                    .extents
                    .iter()
                    .zip(requests)
                    .all(|(extent, request)| {
                        extent.range.start == request.offset
                            && extent.range.end - extent.range.start
                                == request.destination.len() as u64
                    })
        };
        self.windows
            .iter()
            .position(same)
            .expect("a window of the plan")
    }
}

impl Backend for Misbehaving {
    fn kind(&self) -> BackendKind {
        self.backend.kind()
    }

    fn read(
        &self,
        requests: Vec<ReadRequest<'_>>,
        params: &TransferParams,
        control: &Control,
    ) -> Result<ReadStats> {
        self.calls.fetch_add(1, Ordering::Relaxed);
        let window = self.window(&requests);
        let path = requests[0].file.path().to_owned();
        let offset = requests[0].offset;
        let from = |key| {
            self.plan
                .at(key, self.rank)
                .is_some_and(|from| window >= from)
        };
        if from("hang") {
            // Some of it is there already.
            say("hangs");
            std::thread::sleep(Duration::from_secs(3600));
        }
        assert!(!from("panic"), "as told");
        if self.plan.at("fail", self.rank) == Some(window) {
            let source = std::io::Error::from_raw_os_error(5);
            return Err(Error::Read {
                path,
                offset,
                length: 1,
                source,
            });
        }
        if from("cancel") {
            self.cancel.cancel();
        }
        std::thread::sleep(Duration::from_millis(self.plan.number("delay_ms")));
        self.backend.read(requests, params, control)
    }
}

fn say(line: &str) {
    // In one piece, whatever other threads say.
    let mut out = std::io::stdout().lock();
    out.write_all(format!("\n= {line}\n").as_bytes()).unwrap();
    out.flush().unwrap();
}

/// What this process holds that a stream could leave behind.
fn held() -> (usize, usize, usize) {
    let count = |path| std::fs::read_dir(path).unwrap().count();
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    let maps = maps
        .lines()
        .filter(|line| line.contains("tensora-shared"))
        .count();
    (count("/proc/self/task"), count("/proc/self/fd"), maps)
}

fn check(window: &ReadWindow, filled: &FilledWindow) {
    assert_eq!(filled.bytes.len(), window.buffer_bytes);
    for extent in &window.extents {
        for (place, offset) in (extent.at..).zip(extent.range.clone()) {
            assert_eq!(
                filled.bytes[place],
                byte(extent.file, offset),
                "window {}",
                filled.number
            );
        }
    }
}

/// A member, as the environment tells it.
pub(crate) fn member() {
    let plan = Plan::from_env();
    let rank = plan.number("rank");
    let windows = plan.windows();
    let directory = PathBuf::from(plan.get("directory").unwrap());
    let files = || -> Vec<_> {
        let open = |file| SourceFile::open(directory.join(format!("{file}"))).map(Arc::new);
        (0..FILES).map(|file| open(file).unwrap()).collect()
    };
    let kind: BackendKind = plan.get("backend").unwrap().parse().unwrap();
    // Where this one cannot run, its part of the test is played by another.
    let inner = tensora_io::backend(kind)
        .or_else(|error| {
            say(&format!("skipped: {error}"));
            tensora_io::backend(BackendKind::Sync)
        })
        .unwrap();
    let cancel = CancelToken::new();
    let backend = Arc::new(Misbehaving {
        backend: inner,
        plan: plan.clone(),
        rank,
        windows: windows.iter().map(|each| each.window.clone()).collect(),
        cancel: cancel.clone(),
        calls: AtomicU64::new(0),
    });
    let read = Arc::clone(&backend);
    let transfer = TransferParams {
        chunk_bytes: 8192,
        queue_depth: 2,
        workers: 2,
        direct: DirectPolicy::Preferred,
        resident: ResidentPolicy::Reread,
    };
    let buffer_bytes = windows
        .iter()
        .map(|each| each.window.buffer_bytes)
        .max()
        .unwrap();
    let small = |key| u32::try_from(plan.number(key)).unwrap();
    let time = |key| Duration::from_millis(plan.number(key));
    let params = StreamParams::new(small("buffers"), buffer_bytes, small("readers"), transfer)
        .with_lease_timeout(time("lease_ms"));
    let options = SharedOptions::new(
        plan.name(),
        small("rank"),
        small("world"),
        plan.get("fingerprint").unwrap(),
    )
    .with_join_timeout(time("join_ms"))
    .with_silence_timeout(time("silence_ms"));
    // Async backends keep threads of their own.
    let before = held();
    let progress = Arc::new(AtomicU64::new(0));
    let counted = Arc::clone(&progress);
    let control = Control::new()
        .with_cancel(cancel)
        .with_progress(move |bytes| _ = counted.fetch_add(bytes, Ordering::Relaxed));
    let joined = SharedStream::join(&options, files(), windows.clone(), backend, params, control);
    let mut stream = match joined {
        Ok(stream) => stream,
        Err(error) => return say(&format!("error {error}")),
    };
    let mut expected =
        (0..windows.len()).filter(|&number| windows[number].wanted.contains(small("rank")));
    let mut leases = VecDeque::new();
    let mut bytes = 0;
    let hold = plan.at("hold", rank);
    // All may keep a lease while they ask for the next, if there is a buffer besides.
    let kept = usize::from(small("buffers") > small("world"));
    let mut held_back = false;
    let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        loop {
            let filled = match stream.next() {
                None => break "ended".to_owned(),
                Some(Err(error)) => break format!("error {error}"),
                Some(Ok(filled)) => filled,
            };
            assert_eq!(Some(filled.number), expected.next());
            let window = &windows[filled.number].window;
            check(window, &filled);
            say(&format!("got {}", filled.number));
            bytes += window.read_bytes();
            std::thread::sleep(time("consume_ms"));
            leases.push_back(filled);
            if hold.is_some_and(|hold| leases.back().unwrap().number >= hold) && !held_back {
                held_back = true;
                say("holds");
                std::io::stdin().read_exact(&mut [0]).unwrap();
                // Whatever has happened meanwhile, they are as they were.
                for lease in leases.drain(..) {
                    check(&windows[lease.number].window, &lease);
                }
            }
            // A few are kept for a while.
            while leases.len() > kept {
                let lease = leases.pop_front().unwrap();
                check(&windows[lease.number].window, &lease);
                if hold.is_some() && !held_back {
                    leases.push_front(lease);
                    break;
                }
            }
        }
    }));
    let outcome = outcome.unwrap_or_else(|panic| {
        assert_eq!(panic.downcast_ref::<&str>(), Some(&"as told"));
        "panicked".to_owned()
    });
    if outcome == "ended" {
        assert_eq!(expected.next(), None, "a window is missing");
        assert!(stream.next().is_none());
    }
    assert_eq!(progress.load(Ordering::Relaxed), bytes);
    let report = stream.report();
    drop(stream);
    // They outlive the stream.
    for lease in leases.drain(..) {
        check(&windows[lease.number].window, &lease);
    }
    assert_eq!(
        held(),
        before,
        "left threads, descriptors or mappings behind"
    );
    if report.role == SharedRole::Leader {
        say("leads");
    }
    say(&format!("members {}", report.members.len()));
    say(&format!("read_here {}", report.windows_read_here));
    say(&format!("calls {}", read.calls.load(Ordering::Relaxed)));
    say(&format!("received {}", report.windows_received));
    say(&format!("died {}", report.died.len()));
    say(&format!("rejected {}", report.rejected.len()));
    for reason in &report.rejected {
        say(&format!("rejected because {reason}"));
    }
    if let Some(reason) = &report.alone_since {
        say(&format!("alone {reason}"));
    }
    say(&outcome);
}

/// Takes the name of a group of the user who started it.
pub(crate) fn squatter() {
    let plan = Plan::from_env();
    let name = format!("tensora-group/0/{}", plan.name());
    let socket = rustix::net::socket(AddressFamily::UNIX, SocketType::SEQPACKET, None).unwrap();
    rustix::net::bind(
        &socket,
        &SocketAddrUnix::new_abstract_name(name.as_bytes()).unwrap(),
    )
    .unwrap();
    rustix::net::listen(&socket, 8).unwrap();
    std::thread::sleep(Duration::from_secs(3600));
}

/// Connects to the leader of a group of the user who started it, and is turned away.
pub(crate) fn intruder() {
    let plan = Plan::from_env();
    let name = format!("tensora-group/0/{}", plan.name());
    let socket = rustix::net::socket(AddressFamily::UNIX, SocketType::SEQPACKET, None).unwrap();
    rustix::net::connect(
        &socket,
        &SocketAddrUnix::new_abstract_name(name.as_bytes()).unwrap(),
    )
    .unwrap();
    // The refusal, and the end.
    let mut record = [0; 4096];
    let (read, _) =
        rustix::net::recv(&socket, &mut record[..], rustix::net::RecvFlags::empty()).unwrap();
    assert!(String::from_utf8_lossy(&record[..read]).contains("user 65534"));
    let (read, _) =
        rustix::net::recv(&socket, &mut record[..], rustix::net::RecvFlags::empty()).unwrap();
    assert_eq!(read, 0);
}

/// The processes of a group, and the files they read.
pub(crate) struct Group {
    directory: tempfile::TempDir,
    name: String,
    pub(crate) members: Vec<Process>,
}

pub(crate) struct Process {
    child: Child,
    stdin: Option<ChildStdin>,
    incoming: Mutex<Receiver<String>>,
    lines: Vec<String>,
}

impl Process {
    pub(crate) fn lines(&self) -> &[String] {
        &self.lines
    }

    pub(crate) fn line(&self, start: &str) -> Option<&str> {
        self.lines
            .iter()
            .find(|line| line.starts_with(start))
            .map(String::as_str)
    }

    pub(crate) fn says(&self, what: &str) -> bool {
        self.lines.iter().any(|line| line.contains(what))
    }

    pub(crate) fn number(&self, key: &str) -> u64 {
        let start = format!("{key} ");
        self.line(&start)
            .map_or(0, |line| line[start.len()..].parse().unwrap())
    }

    /// The next line, or `None` at the end.
    fn read(&mut self, deadline: Instant) -> Option<()> {
        let left = deadline.saturating_duration_since(Instant::now());
        match self.incoming.lock().unwrap().recv_timeout(left) {
            Ok(line) => self.lines.push(line),
            Err(RecvTimeoutError::Disconnected) => return None,
            Err(RecvTimeoutError::Timeout) => panic!("a member hangs: {:?}", self.lines),
        }
        Some(())
    }
}

impl Group {
    pub(crate) fn new(plan: &Plan) -> Self {
        let directory = tempfile::tempdir().unwrap();
        for file in 0..FILES {
            let content: Vec<u8> = (0..file_len(file))
                .map(|offset| byte(file, offset))
                .collect();
            std::fs::write(directory.path().join(format!("{file}")), content).unwrap();
        }
        Self {
            directory,
            name: plan.name().to_owned(),
            members: Vec::new(),
        }
    }

    pub(crate) fn start(plan: &Plan, ranks: Range<u32>) -> Self {
        let mut group = Self::new(plan);
        ranks.for_each(|rank| _ = group.add(plan, rank));
        group
    }

    fn command(&self, plan: &Plan, test: &str, rank: u32) -> Command {
        let directory: &Path = self.directory.path();
        let plan = plan
            .clone()
            .with("rank", rank)
            .with("directory", directory.display());
        let mut command = Command::new(std::env::current_exe().unwrap());
        command
            .args([
                "--ignored",
                "--exact",
                test,
                "--nocapture",
                "--test-threads=1",
            ])
            .env("TENSORA_SHARED_MEMBER", plan.to_env())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped());
        command
    }

    /// Starts one more member.
    pub(crate) fn add(&mut self, plan: &Plan, rank: u32) -> usize {
        let mut child = self
            .command(plan, "processes::member_process", rank)
            .spawn()
            .unwrap();
        let stdout = BufReader::new(child.stdout.take().unwrap());
        let (sender, incoming) = channel();
        std::thread::spawn(move || {
            for line in stdout.lines().map_while(std::result::Result::ok) {
                if let Some(line) = line.strip_prefix("= ") {
                    let _ = sender.send(line.to_owned());
                }
            }
        });
        let stdin = child.stdin.take();
        let incoming = Mutex::new(incoming);
        self.members.push(Process {
            child,
            stdin,
            incoming,
            lines: Vec::new(),
        });
        self.members.len() - 1
    }

    /// Starts something as the user `nobody`.
    pub(crate) fn other_user(&self, plan: &Plan, test: &str) -> Child {
        // The program may lie where only root can look.
        let program =
            std::env::temp_dir().join(format!("tensora-other-user-{}", std::process::id()));
        std::fs::copy(std::env::current_exe().unwrap(), &program).unwrap();
        let command = self.command(plan, test, 0);
        let mut command_there = Command::new(&program);
        command_there.args(command.get_args()).current_dir("/");
        for (key, value) in command.get_envs() {
            command_there.env(key, value.unwrap());
        }
        let child = command_there
            .stdout(Stdio::null())
            .uid(65534)
            .gid(65534)
            .spawn()
            .unwrap();
        std::fs::remove_file(program).unwrap();
        child
    }

    fn is_listening(&self) -> bool {
        let name = format!(
            "@tensora-group/{}/{}",
            rustix::process::geteuid().as_raw(),
            self.name
        );
        std::fs::read_to_string("/proc/net/unix")
            .unwrap()
            .lines()
            .any(|line| line.ends_with(&name))
    }

    /// Waits until somebody listens.
    pub(crate) fn wait_for_name(&self) {
        let deadline = Instant::now() + PATIENCE;
        while !self.is_listening() {
            assert!(Instant::now() < deadline, "nobody listens");
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Waits until a member says something.
    pub(crate) fn wait_for(&mut self, index: usize, what: &str) {
        let member = &mut self.members[index];
        let deadline = Instant::now() + PATIENCE;
        while !member.says(what) {
            assert!(
                member.read(deadline).is_some(),
                "{what} was not said: {:?}",
                member.lines
            );
        }
    }

    /// Waits until a member has said so much, or ends.
    pub(crate) fn wait_for_lines(&mut self, index: usize, count: usize) {
        let member = &mut self.members[index];
        let deadline = Instant::now() + PATIENCE;
        while member.lines.len() < count && member.read(deadline).is_some() {}
    }

    pub(crate) fn signal(&mut self, index: usize, signal: Signal) {
        let pid = Pid::from_child(&self.members[index].child);
        kill_process(pid, signal).unwrap();
    }

    /// Lets a member go on that holds leases.
    pub(crate) fn release(&mut self, index: usize) {
        self.members[index]
            .stdin
            .as_mut()
            .unwrap()
            .write_all(b"\n")
            .unwrap();
    }

    /// Waits for a member's success.
    pub(crate) fn finish_one(&mut self, index: usize) {
        let member = &mut self.members[index];
        let deadline = Instant::now() + PATIENCE;
        while member.read(deadline).is_some() {}
        let status = member.child.wait().unwrap();
        assert!(
            status.success(),
            "member {index}: {status}: {:?}",
            member.lines
        );
    }

    /// Waits for the end of a member that was killed.
    pub(crate) fn reap(&mut self, index: usize) {
        let member = &mut self.members[index];
        while member.read(Instant::now() + PATIENCE).is_some() {}
        member.child.wait().unwrap();
    }

    /// Waits for the success of all.
    pub(crate) fn finish(&mut self) {
        (0..self.members.len()).for_each(|index| self.finish_one(index));
        self.assert_nothing_left();
    }

    /// No socket, no file in the memory file system, no process.
    pub(crate) fn assert_nothing_left(&mut self) {
        for member in &mut self.members {
            assert!(
                member.child.try_wait().unwrap().is_some(),
                "a process is left"
            );
        }
        assert!(!self.is_listening(), "a socket is left");
        if let Ok(entries) = std::fs::read_dir("/dev/shm") {
            for entry in entries.flatten() {
                let name = entry.file_name();
                assert!(
                    !name.to_string_lossy().contains("tensora-shared"),
                    "{name:?} is left"
                );
            }
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // After a failure, not even a stopped one stays.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
