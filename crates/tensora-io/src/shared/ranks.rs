use std::fmt;

/// A set of ranks of a group, below [`MAX_WORLD`](Self::MAX_WORLD).
///
/// ```
/// let ranks: tensora_io::RankSet = [0, 3].into_iter().collect();
/// assert!(ranks.contains(3) && !ranks.contains(1));
/// assert_eq!(ranks.len(), 2);
/// ```
#[derive(Clone, Default, PartialEq, Eq, Hash)]
pub struct RankSet {
    /// A bit per rank, without zeros at the end, so that equal sets are equal.
    words: Vec<u64>,
}

impl RankSet {
    /// Ranks are smaller than this: no machine runs more processes of one group.
    pub const MAX_WORLD: u32 = 1024;

    /// No rank.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a rank.
    ///
    /// # Panics
    ///
    /// When it is not below [`MAX_WORLD`](Self::MAX_WORLD).
    pub fn insert(&mut self, rank: u32) {
        assert!(rank < Self::MAX_WORLD, "rank {rank} of {}", Self::MAX_WORLD);
        let (word, bit) = Self::place(rank);
        if self.words.len() <= word {
            self.words.resize(word + 1, 0);
        }
        self.words[word] |= bit;
    }

    /// Whether a rank is in it.
    pub fn contains(&self, rank: u32) -> bool {
        let (word, bit) = Self::place(rank);
        self.words.get(word).is_some_and(|bits| bits & bit != 0)
    }

    /// How many ranks are in it.
    pub fn len(&self) -> u32 {
        self.words.iter().map(|word| word.count_ones()).sum()
    }

    /// Whether no rank is in it.
    pub fn is_empty(&self) -> bool {
        self.words.is_empty()
    }

    /// The ranks, ascending.
    pub fn iter(&self) -> impl Iterator<Item = u32> + '_ {
        (0..)
            .take(self.words.len() * 64)
            .filter(|&rank| self.contains(rank))
    }

    /// For a message, little-endian.
    #[cfg(all(target_os = "linux", not(tensora_portable)))]
    pub(super) fn to_bytes(&self) -> Vec<u8> {
        self.words
            .iter()
            .flat_map(|word| word.to_le_bytes())
            .collect()
    }

    /// From a message.
    #[cfg(all(target_os = "linux", not(tensora_portable)))]
    pub(super) fn from_bytes(bytes: &[u8]) -> Self {
        let ranks = (0..Self::MAX_WORLD).zip(0_usize..).filter(|&(_, place)| {
            let byte = bytes.get(place / 8).copied().unwrap_or(0);
            byte & (1 << (place % 8)) != 0
        });
        ranks.map(|(rank, _)| rank).collect()
    }

    fn place(rank: u32) -> (usize, u64) {
        ((rank / 64) as usize, 1 << (rank % 64))
    }
}

impl FromIterator<u32> for RankSet {
    /// # Panics
    ///
    /// As [`insert`](RankSet::insert).
    fn from_iter<I: IntoIterator<Item = u32>>(ranks: I) -> Self {
        let mut set = Self::new();
        for rank in ranks {
            set.insert(rank);
        }
        set
    }
}

impl fmt::Debug for RankSet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_set().entries(self.iter()).finish()
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn behaves_like_a_set(ranks in prop::collection::vec(0..RankSet::MAX_WORLD, 0..40)) {
            let set: RankSet = ranks.iter().copied().collect();
            let naive: BTreeSet<u32> = ranks.iter().copied().collect();
            prop_assert_eq!(set.iter().collect::<Vec<_>>(), naive.iter().copied().collect::<Vec<_>>());
            prop_assert_eq!(set.len() as usize, naive.len());
            prop_assert_eq!(set.is_empty(), naive.is_empty());
            for rank in 0..RankSet::MAX_WORLD + 70 {
                prop_assert_eq!(set.contains(rank), naive.contains(&rank));
            }
            #[cfg(all(target_os = "linux", not(tensora_portable)))]
            prop_assert_eq!(&RankSet::from_bytes(&set.to_bytes()), &set);
            prop_assert_eq!(set, naive.into_iter().rev().collect());
        }
    }

    #[test]
    #[should_panic(expected = "rank 1024 of 1024")]
    fn refuses_a_rank_that_no_world_has() {
        RankSet::new().insert(1024);
    }
}
