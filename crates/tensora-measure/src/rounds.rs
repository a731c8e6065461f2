/// The order in which a round takes its cases: each round begins with another one, so that none always
/// follows the same neighbour or always comes first. Calls with `round` 0, 1, 2, … .
pub fn rotation(cases: usize, round: usize) -> impl Iterator<Item = usize> {
    let begin = round % cases.max(1);
    (begin..cases).chain(0..begin)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_round_has_every_case_once_and_begins_elsewhere() {
        let round = |number| rotation(3, number).collect::<Vec<_>>();
        assert_eq!(round(0), [0, 1, 2]);
        assert_eq!(round(1), [1, 2, 0]);
        assert_eq!(round(5), [2, 0, 1]);
        assert_eq!(rotation(0, 7).count(), 0);
    }
}
