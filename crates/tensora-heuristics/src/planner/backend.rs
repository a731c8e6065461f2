//! The regime table, and the order of preference in each regime.

use tensora_io::BackendKind;

use super::profile::Pick;
use super::{Case, Obstacle, Place, decided};
use crate::tuning::{self, evidence};
use crate::units::{Bytes, count, gigabytes};
use crate::{
    AccessPattern, BackendChoice, Decision, MemoryKind, PlanError, Rejection, Result, StorageLayout,
};

/// The rows of the regime table, and above them the places where the bytes' whereabouts decide.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Regime {
    /// From memory to memory.
    Copy,
    /// Behind a server.
    Server,
    /// Small or single-shard SafeTensors.
    Small,
    /// Large multi-shard SafeTensors, large partitioned ServerlessLLM.
    Large,
    /// The same, with a good part of it in the page cache.
    LargeHalfResident,
    /// Range-access ServerlessLLM.
    Extents,
    /// Partitioned ServerlessLLM that is not large.
    SmallPartitions,
}

impl Regime {
    /// The order of preference. Async follows sync because it makes the same reads at a small price;
    /// mmap comes last everywhere because for owned memory it copies out of the page cache.
    const fn order(self) -> [BackendKind; 4] {
        use BackendKind::{Async, IoUring, Mmap, Sync};
        match self {
            Self::Copy
            | Self::Server
            | Self::Small
            | Self::SmallPartitions
            | Self::LargeHalfResident => [Sync, Async, IoUring, Mmap],
            Self::Large => [IoUring, Sync, Async, Mmap],
            Self::Extents => [Async, Sync, IoUring, Mmap],
        }
    }

    /// What speaks against a backend that could run but is not the best.
    fn against(self, kind: BackendKind) -> String {
        match (self, kind) {
            (Self::Copy, BackendKind::Mmap) => {
                "for owned memory it adds a mapping to the same copy".to_owned()
            }
            (_, BackendKind::Mmap) => format!(
                "for owned memory it copies out of the page cache, after filling that ({})",
                evidence::COLD_COPY_OF_MAPPING
            ),
            (Self::Extents, BackendKind::Sync) => {
                "its one queue takes the extents as they come, where tasks keep those of one file \
                 together"
                    .to_owned()
            }
            (Self::Extents, BackendKind::IoUring) => {
                "rings are for long batches; the regime table keeps them for whole checkpoints"
                    .to_owned()
            }
            (Self::Large, BackendKind::Sync) => "threads trail by a few per cent".to_owned(),
            (_, BackendKind::Async) => {
                "it makes the same reads as sync, each handed to Tokio's blocking pool first"
                    .to_owned()
            }
            (Self::Copy, _) => {
                "there is no device to keep busy, or hardly, only a copy to spread over the CPUs"
                    .to_owned()
            }
            (Self::Server, _) => {
                "many reads at once are what a server behind a file system handles worst".to_owned()
            }
            (Self::LargeHalfResident, _) => format!(
                "a ring's worker submits nothing while it copies what is in memory ({})",
                evidence::HALF_RINGS_TRAIL
            ),
            (Self::SmallPartitions, _) => {
                format!("rings have no lead at this size ({})", evidence::PARTITIONS)
            }
            (_, _) => format!(
                "rings lead, by a few per cent, only from {} in several files on",
                gigabytes(tuning::LARGE_LOAD_BYTES)
            ),
        }
    }
}

impl Case<'_> {
    pub(super) fn backend(
        &self,
        memory: MemoryKind,
        pick: Option<&Pick<'_>>,
    ) -> Result<(BackendKind, Decision)> {
        if memory == MemoryKind::Mapped {
            let reason = "Mapped memory comes from the mmap backend only.".to_owned();
            return Ok(decided("backend", BackendKind::Mmap, reason, Vec::new()));
        }
        let BackendChoice::Named(named) = self.policy.backend else {
            return match pick {
                Some(pick) => Ok(self.measured_backend(pick)),
                None => self.suitable_backend(),
            };
        };
        // The name decides, but who named it may like to know what it was chosen over.
        let rejected = match self.suitable_backend() {
            Ok((suitable, decision)) if suitable != named => vec![Rejection::new(
                suitable,
                format!(
                    "{named} was named. Left to the planner: {}",
                    decision.reason
                ),
            )],
            Ok(_) | Err(_) => Vec::new(),
        };
        Ok(decided(
            "backend",
            named,
            "It was named.".to_owned(),
            rejected,
        ))
    }

    /// The first backend in the regime's order that can run.
    fn suitable_backend(&self) -> Result<(BackendKind, Decision)> {
        let regime = self.regime();
        let mut rejected = Vec::new();
        let mut chosen = None;
        for kind in regime.order() {
            match self.obstacle(kind) {
                Some(Obstacle { reason, remedy }) => {
                    rejected.push(Rejection::new(kind, format!("{reason} ({remedy})")));
                }
                None if chosen.is_none() => chosen = Some(kind),
                None => rejected.push(Rejection::new(kind, regime.against(kind))),
            }
        }
        let Some(chosen) = chosen else {
            return Err(PlanError::NoBackend { rejected });
        };
        let [first, ..] = regime.order();
        let mut reason = self.regime_reason(regime);
        if self.streams
            && matches!(
                regime,
                Regime::Small | Regime::Large | Regime::SmallPartitions
            )
        {
            reason.push_str(" That was measured of loads; streams are taken to be alike.");
        }
        if chosen != first {
            reason.push_str(&format!(
                " That speaks for {first}, which cannot be used; {chosen} is the next in order of \
                 preference."
            ));
        }
        Ok(decided("backend", chosen, reason, rejected))
    }

    /// The backend that was the fastest when it was measured.
    fn measured_backend(&self, pick: &Pick<'_>) -> (BackendKind, Decision) {
        let chosen = pick.measurement.backend;
        let others = self.regime().order().into_iter();
        let rejected = others
            .filter(|kind| *kind != chosen)
            .map(|kind| match self.obstacle(kind) {
                Some(Obstacle { reason, remedy }) => {
                    Rejection::new(kind, format!("{reason} ({remedy})"))
                }
                None => Rejection::new(kind, pick.against(kind)),
            })
            .collect();
        decided("backend", chosen, pick.reason.clone(), rejected)
    }

    fn regime(&self) -> Regime {
        let large = self.workload.read_bytes >= tuning::LARGE_LOAD_BYTES;
        match self.regime_of(large) {
            Regime::Large
                if self.place == Place::Mixed
                    && self.resident_percent() >= Some(tuning::PROFILE_HALF_PERCENT) =>
            {
                Regime::LargeHalfResident
            }
            regime => regime,
        }
    }

    fn regime_of(&self, large: bool) -> Regime {
        match (self.place, self.workload.layout, self.workload.access) {
            (Place::Memory | Place::PageCache, ..) => Regime::Copy,
            (Place::Mixed, ..) if self.is_mostly_resident() => Regime::Copy,
            (Place::Server, ..) => Regime::Server,
            // A window of a stream is in order, and of few files, already.
            (_, StorageLayout::ServerlessLlm, AccessPattern::Ranges) if !self.streams => {
                Regime::Extents
            }
            (_, StorageLayout::ServerlessLlm, _) if large => Regime::Large,
            (_, StorageLayout::ServerlessLlm, _) => Regime::SmallPartitions,
            // A selection is merged into extents and cut into chunks, so its bytes count, not its
            // pattern.
            (_, StorageLayout::SafeTensors, _) if large && self.workload.files > 1 => Regime::Large,
            (_, StorageLayout::SafeTensors, _) => Regime::Small,
        }
    }

    fn regime_reason(&self, regime: Regime) -> String {
        let size = Bytes(self.workload.read_bytes);
        let files = self.files();
        let large = gigabytes(tuning::LARGE_LOAD_BYTES);
        match regime {
            Regime::Copy if self.place == Place::Mixed => format!(
                "{} Most of what is left to do is a copy, and threads spread it over the CPUs.",
                self.whereabouts()
            ),
            Regime::Copy => format!(
                "{} What is left to do is a copy, and threads spread it over the CPUs.",
                self.whereabouts()
            ),
            Regime::Server => format!(
                "{} A few threads, each with a long sequence to read, suit it best.",
                self.whereabouts()
            ),
            Regime::Large => format!(
                "{size} in {files} is a large load, {large} or more, and large loads favour rings ({}).",
                evidence::LARGE
            ),
            Regime::LargeHalfResident => format!(
                "{} Threads copy that part while other threads wait for the device, which was faster than \
                 rings ({}).",
                self.whereabouts(),
                evidence::HALF_RINGS_TRAIL
            ),
            Regime::Extents => format!(
                "These are ranges of a ServerlessLLM directory, {} in {files}; tasks grouped per file \
                 read each partition's ranges together.",
                count(self.workload.requests, "extent"),
            ),
            Regime::SmallPartitions => format!(
                "{size} in {files} is below {large}, where threads are at least as fast as rings ({}).",
                evidence::PARTITIONS
            ),
            Regime::Small if self.workload.files > 1 => format!(
                "{size} in {files} is below {large}, and small loads favour threads ({}).",
                evidence::SMALL
            ),
            Regime::Small => format!(
                "{size} in {files}: threads are at least as fast as rings on one shard ({}).",
                evidence::SMALL
            ),
        }
    }
}
