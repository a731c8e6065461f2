/// The order in which a round takes its cases: shuffled, so that none always follows the same neighbour or
/// always comes first, and the same in every run. Calls with `round` 0, 1, 2, … .
///
/// Turning one order round by round is not enough: what a case leaves behind, in memory and on the device,
/// would always fall to the same one.
pub fn shuffled(cases: usize, round: usize) -> impl Iterator<Item = usize> {
    let mut order: Vec<_> = (0..cases).collect();
    let mut state = round as u64;
    for left in (1..cases).rev() {
        #[allow(clippy::cast_possible_truncation)]
        let place = (next(&mut state) % (left as u64 + 1)) as usize;
        order.swap(left, place);
    }
    order.into_iter()
}

/// SplitMix64 (Steele, Lea and Flood, 2014): enough for an order.
fn next(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9E37_79B9_7F4A_7C15);
    let mut mixed = *state;
    mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    mixed ^ (mixed >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_round_has_every_case_once() {
        for cases in 0..20 {
            for round in 0..20 {
                let mut order: Vec<_> = shuffled(cases, round).collect();
                assert_eq!(order, shuffled(cases, round).collect::<Vec<_>>());
                order.sort_unstable();
                assert_eq!(order, (0..cases).collect::<Vec<_>>());
            }
        }
    }

    #[test]
    fn no_case_has_a_fixed_neighbour_or_place() {
        let (cases, rounds) = (10, 200);
        let mut after = vec![vec![0; cases]; cases];
        let mut first = vec![0; cases];
        for round in 0..rounds {
            let order: Vec<_> = shuffled(cases, round).collect();
            first[order[0]] += 1;
            for pair in order.windows(2) {
                after[pair[0]][pair[1]] += 1;
            }
        }
        // Twenty times each is expected; nothing is near never or always.
        assert!(
            first.iter().all(|count| (5..60).contains(count)),
            "{first:?}"
        );
        for (case, row) in after.iter().enumerate() {
            for (other, &count) in row.iter().enumerate() {
                assert!(case == other || (5..60).contains(&count), "{after:?}");
            }
        }
    }
}
