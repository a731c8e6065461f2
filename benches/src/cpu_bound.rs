//! What the processor bounds: reading metadata, planning, merging ranges.
//!
//! Criterion times these cases and callgrind counts their instructions, so that both speak of the same
//! work. Where there is a case of the `safetensors` crate beside ours, it reads and parses the same headers
//! and nothing else: it looks at no index, and does not know which shard a tensor should be in.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{Read, Write};
use std::num::NonZero;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use safetensors::tensor::Metadata;
use tensora_formats::{
    CheckpointIndex, CheckpointLayout, Dtype, DuplicateNames, STORE_PARTITION_BYTES, Sharding,
    TensorSpec, parse_safetensors_header, parse_safetensors_index, parse_serverlessllm_index,
    partitioned_layout, safetensors_layout, store_layout,
};
use tensora_heuristics::{AccessPattern, Policy, StorageLayout, Workload, plan};
use tensora_io::{
    Availability, BackendFact, BackendKind, CacheState, DirectPolicy, DirectSupport,
    FileSystemClass, Measurement, MemoryKind, Platform, Profile, ProfileFact, ProfileIdentity,
    ResidentPolicy, StorageFacts, TransferParams, merge_ranges,
};

/// Where [`CpuFixtures::write`] puts the checkpoint of 18,867 tensors.
const EXPERTS_FOLDER: &str = "experts-18867";
/// Where it puts the one of 92,160 tensors.
const MANY_EXPERTS_FOLDER: &str = "experts-92160";

const DENSE_BYTES: u64 = 1_503_264_768;
const EXPERTS_BYTES: u64 = 61_064_245_248;
const MANY_EXPERTS_BYTES: u64 = 676_622_499_840;
const EXPERTS_TENSORS: u64 = 18_867;
const RANGES: u64 = 20_000;

/// One piece of work that the processor bounds.
#[derive(Clone, Copy, Debug)]
pub struct CpuCase {
    /// How it is called on the command line and in tables.
    pub name: &'static str,
    /// The case of the `safetensors` crate to compare it with, if there is one.
    pub reference: Option<&'static str>,
    /// Whether the kernel does most of the work, whose instructions callgrind does not count.
    pub mostly_kernel: bool,
    /// What a run answers if it has done its work: bytes of tensors, or how many of something.
    expected: u64,
    prepare: fn(&Path) -> Result<Work>,
}

type Work = Box<dyn Fn() -> Result<u64>>;

/// A case whose input is in memory or on disk.
pub struct PreparedCase {
    name: &'static str,
    expected: u64,
    work: Work,
}

impl std::fmt::Debug for PreparedCase {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("PreparedCase")
            .field("name", &self.name)
            .finish_non_exhaustive()
    }
}

const CASES: &[CpuCase] = &[
    CpuCase {
        name: "header-311",
        reference: Some("header-311-crate"),
        mostly_kernel: false,
        expected: DENSE_BYTES,
        prepare: |_| parse_header(&dense()),
    },
    CpuCase {
        name: "header-311-crate",
        reference: None,
        mostly_kernel: false,
        expected: DENSE_BYTES,
        prepare: |_| parse_header_with_crate(&dense()),
    },
    CpuCase {
        name: "header-18867",
        reference: Some("header-18867-crate"),
        mostly_kernel: false,
        expected: EXPERTS_BYTES,
        prepare: |_| parse_header(&experts()),
    },
    CpuCase {
        name: "header-18867-crate",
        reference: None,
        mostly_kernel: false,
        expected: EXPERTS_BYTES,
        prepare: |_| parse_header_with_crate(&experts()),
    },
    CpuCase {
        name: "shard-index-18867",
        reference: None,
        mostly_kernel: false,
        expected: EXPERTS_TENSORS,
        prepare: |_| parse_shard_index(),
    },
    CpuCase {
        name: "store-index-18867",
        reference: None,
        mostly_kernel: false,
        expected: EXPERTS_TENSORS,
        prepare: |_| parse_tensor_index(&store_layout(&experts(), STORE_PARTITION_BYTES)?),
    },
    CpuCase {
        name: "partitioned-index-18867",
        reference: None,
        mostly_kernel: false,
        expected: EXPERTS_TENSORS,
        prepare: |_| parse_tensor_index(&partitioned_layout(&experts(), count(8)?)?),
    },
    CpuCase {
        name: "open-18867",
        reference: Some("open-18867-crate"),
        mostly_kernel: false,
        expected: EXPERTS_BYTES,
        prepare: |fixtures| open(&fixtures.join(EXPERTS_FOLDER)),
    },
    CpuCase {
        name: "open-18867-crate",
        reference: None,
        mostly_kernel: false,
        expected: EXPERTS_BYTES,
        prepare: |fixtures| open_with_crate(&fixtures.join(EXPERTS_FOLDER)),
    },
    CpuCase {
        name: "open-92160",
        reference: Some("open-92160-crate"),
        mostly_kernel: false,
        expected: MANY_EXPERTS_BYTES,
        prepare: |fixtures| open(&fixtures.join(MANY_EXPERTS_FOLDER)),
    },
    CpuCase {
        name: "open-92160-crate",
        reference: None,
        mostly_kernel: false,
        expected: MANY_EXPERTS_BYTES,
        prepare: |fixtures| open_with_crate(&fixtures.join(MANY_EXPERTS_FOLDER)),
    },
    CpuCase {
        name: "plan",
        reference: None,
        mostly_kernel: false,
        expected: 1,
        prepare: |_| Ok(planning(ProfileFact::NotSought)),
    },
    CpuCase {
        name: "plan-with-profile",
        reference: None,
        mostly_kernel: false,
        expected: 1,
        prepare: |_| Ok(planning(profile()?)),
    },
    CpuCase {
        name: "probe-and-plan-163-files",
        reference: None,
        mostly_kernel: true,
        expected: 1,
        prepare: |fixtures| probing(&fixtures.join(MANY_EXPERTS_FOLDER)),
    },
    CpuCase {
        name: "merge-20000-ranges",
        reference: None,
        mostly_kernel: false,
        expected: RANGES / 2,
        prepare: |_| Ok(merging()),
    },
];

impl CpuCase {
    /// Every case, in the order of tables.
    pub fn all() -> &'static [Self] {
        CASES
    }

    /// The case of this name.
    pub fn find(name: &str) -> Option<&'static Self> {
        CASES.iter().find(|case| case.name == name)
    }

    /// Makes the input that the case reads; `fixtures` is a folder that [`write_cpu_fixtures`] has filled.
    ///
    /// # Errors
    ///
    /// When files of the fixtures are missing.
    pub fn prepare(&self, fixtures: &Path) -> Result<PreparedCase> {
        let work = (self.prepare)(fixtures).with_context(|| format!("prepare {}", self.name))?;
        Ok(PreparedCase {
            name: self.name,
            expected: self.expected,
            work,
        })
    }
}

impl PreparedCase {
    /// Does the work once.
    ///
    /// Kept as a function of its own, under this name, so that callgrind can be told to count in it.
    ///
    /// # Errors
    ///
    /// When the work fails, or answers with something else than what is known to be right.
    #[inline(never)]
    pub fn run(&self) -> Result<u64> {
        let answer = (self.work)().with_context(|| format!("run {}", self.name))?;
        ensure!(
            answer == self.expected,
            "{}: the answer is {answer}, but should be {}",
            self.name,
            self.expected
        );
        Ok(answer)
    }
}

/// Fills the folder with the checkpoints that cases open: real headers, and holes in place of the data.
///
/// # Errors
///
/// When a file cannot be written.
pub fn write_cpu_fixtures(folder: &Path) -> Result<()> {
    let write = |name: &str, specs: &[TensorSpec], shards| {
        let folder = folder.join(name);
        fs::create_dir_all(&folder).with_context(|| format!("create {}", folder.display()))?;
        let layout = shard_layout(specs, Sharding::Count(count(shards)?))?;
        for planned in &layout.files {
            let path = folder.join(&planned.name);
            let mut file = File::create(&path).with_context(|| path.display().to_string())?;
            file.write_all(&planned.prefix)?;
            file.set_len(planned.bytes)?;
        }
        if let Some(index) = &layout.index {
            fs::write(folder.join(&index.name), &index.contents)?;
        }
        Ok(())
    };
    write(EXPERTS_FOLDER, &experts(), 16)?;
    write(MANY_EXPERTS_FOLDER, &many_experts(), 163)
}

fn count(count: u32) -> Result<NonZero<u32>> {
    NonZero::new(count).context("a count of 0")
}

fn spec(name: String, dtype: Dtype, shape: &[u64]) -> TensorSpec {
    TensorSpec {
        name,
        dtype,
        shape: shape.to_owned(),
    }
}

/// The tensors of a Qwen3 model. `feed_forward` adds those of one layer.
fn qwen3(
    layers: u64,
    hidden: u64,
    query: u64,
    key: u64,
    feed_forward: impl Fn(&str, &mut Vec<TensorSpec>),
) -> Vec<TensorSpec> {
    let bf16 = |name: String, shape: &[u64]| spec(name, Dtype::BF16, shape);
    let mut specs = vec![
        bf16("lm_head.weight".into(), &[151_936, hidden]),
        bf16("model.embed_tokens.weight".into(), &[151_936, hidden]),
        bf16("model.norm.weight".into(), &[hidden]),
    ];
    for layer in 0..layers {
        let layer = format!("model.layers.{layer}");
        feed_forward(&layer, &mut specs);
        for (name, shape) in [
            ("input_layernorm", &[hidden][..]),
            ("post_attention_layernorm", &[hidden]),
            ("self_attn.q_proj", &[query, hidden]),
            ("self_attn.k_proj", &[key, hidden]),
            ("self_attn.v_proj", &[key, hidden]),
            ("self_attn.o_proj", &[hidden, query]),
            ("self_attn.q_norm", &[128]),
            ("self_attn.k_norm", &[128]),
        ] {
            specs.push(bf16(format!("{layer}.{name}.weight"), shape));
        }
    }
    specs.sort_by(|left, right| left.name.cmp(&right.name));
    specs
}

/// The 311 tensors of Qwen3-0.6B.
fn dense() -> Vec<TensorSpec> {
    qwen3(28, 1024, 2048, 1024, |layer, specs| {
        for (name, shape) in [
            ("gate_proj", [3072, 1024]),
            ("up_proj", [3072, 1024]),
            ("down_proj", [1024, 3072]),
        ] {
            specs.push(spec(
                format!("{layer}.mlp.{name}.weight"),
                Dtype::BF16,
                &shape,
            ));
        }
    })
}

/// The 18,867 tensors of Qwen3-30B-A3B.
fn experts() -> Vec<TensorSpec> {
    qwen3(48, 2048, 4096, 512, |layer, specs| {
        let mut push = |name: String, shape: &[u64]| specs.push(spec(name, Dtype::BF16, shape));
        push(format!("{layer}.mlp.gate.weight"), &[128, 2048]);
        for expert in 0..128 {
            let expert = format!("{layer}.mlp.experts.{expert}");
            push(format!("{expert}.gate_proj.weight"), &[768, 2048]);
            push(format!("{expert}.up_proj.weight"), &[768, 2048]);
            push(format!("{expert}.down_proj.weight"), &[2048, 768]);
        }
    })
}

/// As many tensors as the largest published checkpoints have: 60 layers of 256 experts whose 8-bit
/// weights have a tensor of scales each.
fn many_experts() -> Vec<TensorSpec> {
    let mut specs = Vec::new();
    for layer in 0..60 {
        for expert in 0..256 {
            for (name, rows, columns) in [
                ("gate_proj", 2048, 7168),
                ("up_proj", 2048, 7168),
                ("down_proj", 7168, 2048),
            ] {
                let weight = format!("model.layers.{layer}.mlp.experts.{expert}.{name}.weight");
                let scales = format!("{weight}_scale_inv");
                specs.push(spec(weight, Dtype::F8E4M3, &[rows, columns]));
                specs.push(spec(scales, Dtype::F32, &[rows / 128, columns / 128]));
            }
        }
    }
    specs.sort_by(|left, right| left.name.cmp(&right.name));
    specs
}

fn shard_layout(specs: &[TensorSpec], sharding: Sharding) -> Result<CheckpointLayout> {
    let metadata = BTreeMap::from([("format".to_owned(), "pt".to_owned())]);
    Ok(safetensors_layout(specs, &metadata, sharding, 0)?)
}

/// The header of a file that holds all of `specs`, and the length of that file in bytes.
fn header(specs: &[TensorSpec]) -> Result<(Vec<u8>, u64)> {
    let layout = shard_layout(specs, Sharding::Single)?;
    let file = layout.files.into_iter().next().context("one file")?;
    let header = file.prefix.get(8..).context("a header")?.to_owned();
    Ok((header, file.bytes))
}

fn parse_header(specs: &[TensorSpec]) -> Result<Work> {
    let (header, file_bytes) = header(specs)?;
    Ok(Box::new(move || {
        let path = Path::new("model.safetensors");
        let parsed = parse_safetensors_header(path, &header, file_bytes, DuplicateNames::Reject)?;
        Ok(parsed.tensors.iter().map(|tensor| tensor.bytes).sum())
    }))
}

fn parse_header_with_crate(specs: &[TensorSpec]) -> Result<Work> {
    let (header, _) = header(specs)?;
    Ok(Box::new(move || {
        let parsed: Metadata = serde_json::from_slice(&header)?;
        Ok(parsed.data_len() as u64)
    }))
}

fn parse_shard_index() -> Result<Work> {
    let layout = shard_layout(&experts(), Sharding::Count(count(16)?))?;
    let index = layout.index.context("an index")?.contents;
    Ok(Box::new(move || {
        let path = Path::new("model.safetensors.index.json");
        let parsed = parse_safetensors_index(path, &index, DuplicateNames::Reject)?;
        Ok(parsed.tensors.len() as u64)
    }))
}

fn parse_tensor_index(layout: &CheckpointLayout) -> Result<Work> {
    let partition_bytes: Vec<u64> = layout.files.iter().map(|file| file.bytes).collect();
    let index = layout.index.clone().context("an index")?.contents;
    Ok(Box::new(move || {
        let path = Path::new("tensor_index.json");
        let parsed =
            parse_serverlessllm_index(path, &index, &partition_bytes, DuplicateNames::Reject)?;
        Ok(parsed.tensors.len() as u64)
    }))
}

fn open(folder: &Path) -> Result<Work> {
    let folder = folder.to_owned();
    Ok(Box::new(move || {
        Ok(CheckpointIndex::open(&folder)?.data_bytes())
    }))
}

/// The least that a program must do that reads the headers with the `safetensors` crate.
fn open_with_crate(folder: &Path) -> Result<Work> {
    let mut paths = Vec::new();
    for entry in fs::read_dir(folder)? {
        let path = entry?.path();
        if path.extension().is_some_and(|it| it == "safetensors") {
            paths.push(path);
        }
    }
    paths.sort();
    Ok(Box::new(move || {
        let shards = paths
            .iter()
            .map(read_with_crate)
            .collect::<Result<Vec<Metadata>>>()?;
        Ok(shards.iter().map(|shard| shard.data_len() as u64).sum())
    }))
}

fn read_with_crate(path: &PathBuf) -> Result<Metadata> {
    let mut file = File::open(path)?;
    let mut length = [0; 8];
    file.read_exact(&mut length)?;
    let mut header = vec![0; usize::try_from(u64::from_le_bytes(length))?];
    file.read_exact(&mut header)?;
    Ok(serde_json::from_slice(&header)?)
}

/// A machine on which everything works, with a cold checkpoint of five shards.
fn platform() -> Platform {
    let backends = BackendKind::ALL.map(|kind| BackendFact {
        kind,
        availability: Availability::Available,
    });
    let mut platform = Platform::unknown(8, backends.to_vec());
    platform.memory.available_bytes = Some(64 << 30);
    let mut storage = StorageFacts::unknown();
    storage.file_system = "ext4".to_owned();
    storage.class = FileSystemClass::Local;
    storage.device = Some("nvme0n1".to_owned());
    storage.direct = DirectSupport::Supported {
        offset_align_bytes: 512,
        memory_align_bytes: 512,
    };
    storage.file_bytes = 16_381_470_720;
    storage.resident_bytes = Some(0);
    platform.storage = Some(storage);
    platform
}

/// A profile with a measurement for each combination that a calibration might try.
fn profile() -> Result<ProfileFact> {
    let identity = ProfileIdentity::of(&platform()).context("a platform with storage")?;
    let mut measurements = Vec::new();
    for cache in [CacheState::Cold, CacheState::Half, CacheState::Warm] {
        for backend in BackendKind::ALL {
            for workers in [1, 2, 4, 8, 16] {
                for direct in [DirectPolicy::Never, DirectPolicy::Preferred] {
                    measurements.push(Measurement {
                        cache,
                        memory: MemoryKind::Owned,
                        backend,
                        params: TransferParams {
                            chunk_bytes: 1 << 20,
                            queue_depth: 16,
                            workers,
                            direct,
                            resident: ResidentPolicy::Copy,
                        },
                        bytes: 1 << 30,
                        elapsed_us: vec![500_000 / u64::from(workers); 3],
                    });
                }
            }
        }
    }
    Ok(ProfileFact::Matching(Box::new(Profile {
        version: Profile::VERSION,
        made_by: "benchmark".to_owned(),
        made_at_unix_s: 0,
        identity,
        measurements,
    })))
}

fn planning(profile: ProfileFact) -> Work {
    let mut platform = platform();
    platform.profile = profile;
    let mut workload = Workload::new(StorageLayout::SafeTensors, AccessPattern::WholeFiles);
    workload.files = 5;
    workload.tensors = 399;
    workload.read_bytes = 16_381_470_720;
    workload.requests = 5;
    workload.largest_request_bytes = 4_000_000_000;
    workload.destination_bytes = 16_381_470_720;
    let policy = Policy::default();
    Box::new(move || {
        let plan = plan(&workload, &platform, &policy)?;
        Ok(u64::from(!plan.decisions.is_empty()))
    })
}

/// Opening the files, examining them and the machine, and planning: what a load does after it has read
/// the metadata and before it reads data.
fn probing(folder: &Path) -> Result<Work> {
    let index = CheckpointIndex::open(folder)?;
    let paths: Vec<PathBuf> = index.files().iter().map(|file| file.path.clone()).collect();
    let mut workload = Workload::new(StorageLayout::SafeTensors, AccessPattern::WholeFiles);
    workload.files = u32::try_from(paths.len())?;
    workload.tensors = index.tensors().len() as u64;
    workload.read_bytes = index.data_bytes();
    workload.requests = paths.len() as u64;
    let policy = Policy::default();
    Ok(Box::new(move || {
        let files = paths
            .iter()
            .map(tensora_io::SourceFile::open)
            .collect::<Result<Vec<_>, _>>()?;
        let files: Vec<_> = files.iter().collect();
        let mut platform = Platform::probe();
        platform.storage = Some(StorageFacts::probe(&files));
        let plan = plan(&workload, &platform, &policy)?;
        Ok(u64::from(!plan.decisions.is_empty()))
    }))
}

/// Tensors of 1 to 4 MiB in an order that is not theirs, every second pair with a gap between.
fn merging() -> Work {
    let mut ranges = Vec::new();
    let mut offset = 0;
    for number in 0..RANGES {
        let bytes = (1 + number % 4) << 20;
        ranges.push(offset..offset + bytes);
        offset += bytes + (number % 2) * 8192;
    }
    // A multiplier without a common factor with the count visits each place once.
    let mut shuffled = Vec::new();
    for number in 0..RANGES {
        let place = usize::try_from(number * 7919 % RANGES).unwrap_or_default();
        shuffled.extend(ranges.get(place).cloned());
    }
    Box::new(move || Ok(merge_ranges(shuffled.iter().cloned(), 4096).len() as u64))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_case_does_its_work_and_its_reference_exists() {
        let folder = tempfile::tempdir().unwrap();
        write_cpu_fixtures(folder.path()).unwrap();
        for case in CpuCase::all() {
            case.prepare(folder.path()).unwrap().run().unwrap();
            let reference = case.reference.map(CpuCase::find);
            assert!(reference.is_none_or(|found| found.is_some()), "{case:?}");
        }
    }
}
