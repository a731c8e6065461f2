//! Groups of real processes, which are killed and stopped: this test's own program runs again as each member.
#![cfg(all(feature = "shared", feature = "sync"))]
#![allow(clippy::unwrap_used, clippy::cast_possible_truncation)]

use tensora_io::{Error, SharedOptions};

#[test]
fn names_and_numbers_out_of_range_are_named() {
    let validate = |options: SharedOptions| options.validate().unwrap_err();
    for (name, what) in [
        (String::new(), "is empty"),
        ("a\0b".to_owned(), "contains a NUL character"),
        ("x".repeat(65), "has 65 bytes"),
    ] {
        let error = validate(SharedOptions::new(name, 0, 1, []));
        assert!(matches!(error, Error::InvalidGroup { .. }));
        assert!(error.to_string().contains(what), "{error}");
        assert!(error.to_string().contains("use 1 to 64 bytes"), "{error}");
    }
    for (rank, world, what) in [
        (2, 2, "rank = 2 is outside 0..=1"),
        (0, 0, "world = 0 is outside 1..=1024"),
        (0, 1025, "world = 1025 is outside 1..=1024"),
    ] {
        let error = validate(SharedOptions::new("name", rank, world, []));
        assert!(error.to_string().contains(what), "{error}");
    }
    let error = validate(SharedOptions::new("name", 0, 1, vec![0; 1025]));
    assert!(
        error.to_string().contains("fingerprint bytes = 1025"),
        "{error}"
    );
    let short =
        SharedOptions::new("name", 0, 1, []).with_silence_timeout(std::time::Duration::ZERO);
    assert!(
        validate(short)
            .to_string()
            .contains("silence_timeout ms = 0")
    );
    SharedOptions::new("x".repeat(64), 1023, 1024, vec![0; 1024])
        .validate()
        .unwrap();
}

#[cfg(not(all(target_os = "linux", not(tensora_portable))))]
#[test]
fn elsewhere_joining_says_what_to_do_instead() {
    use tensora_io::*;
    let transfer = TransferParams {
        chunk_bytes: 1 << 20,
        queue_depth: 1,
        workers: 1,
        direct: DirectPolicy::Never,
        resident: ResidentPolicy::Reread,
    };
    let error = SharedStream::join(
        &SharedOptions::new("name", 0, 1, []),
        Vec::new(),
        Vec::new(),
        std::sync::Arc::new(SyncBackend::new()),
        StreamParams::new(1, 4096, 1, transfer),
        Control::new(),
    )
    .unwrap_err();
    assert!(matches!(error, Error::Unsupported { .. }));
    assert!(
        error
            .to_string()
            .contains("only Linux has; let each process read"),
        "{error}"
    );
}

#[cfg(all(target_os = "linux", not(tensora_portable)))]
mod shared_support;

#[cfg(all(target_os = "linux", not(tensora_portable)))]
mod processes {
    use std::time::{Duration, Instant};

    use rustix::process::Signal;

    use super::shared_support::{Group, Plan, Rng, intruder, member, squatter};

    /// Not a test of its own: each member is this one, in a process started by the others.
    #[test]
    #[ignore = "run by the other tests"]
    fn member_process() {
        member();
    }

    #[test]
    #[ignore = "run by the other tests"]
    fn squatter_process() {
        squatter();
    }

    #[test]
    #[ignore = "run by the other tests"]
    fn intruder_process() {
        intruder();
    }

    #[test]
    fn each_window_is_read_once_and_reaches_all_that_want_it() {
        for (seed, world, backend) in [
            (1, 4, "sync"),
            (2, 2, "io-uring"),
            (3, 3, "mmap"),
            (4, 5, "async"),
        ] {
            let plan = Plan::new(seed, world).delay_ms(1).backend(backend);
            let mut group = Group::start(&plan, 0..world);
            group.finish();
            let windows = plan.windows();
            let wanted = windows.iter().filter(|each| !each.wanted.is_empty());
            let wanted = wanted.filter(|each| each.window.buffer_bytes > 0).count() as u64;
            let read: u64 = group
                .members
                .iter()
                .map(|one| one.number("read_here"))
                .sum();
            assert_eq!(read, wanted, "{plan:?}");
            let leaders = group.members.iter().filter(|one| one.says("leads")).count();
            assert_eq!(leaders, 1);
            for one in &group.members {
                assert!(one.says("ended") && !one.says("alone"), "{:?}", one.lines());
                assert!(one.says(&format!("members {world}")), "{:?}", one.lines());
                assert_eq!(one.number("died"), 0);
                assert!(
                    one.number("read_here") < wanted,
                    "one member read everything"
                );
            }
        }
    }

    #[test]
    fn members_that_have_all_they_want_leave_and_the_leader_stays() {
        let plan = Plan::new(21, 4).early().delay_ms(10).readers(3);
        let mut group = Group::start(&plan, 0..1);
        group.wait_for_name();
        (1..4).for_each(|rank| _ = group.add(&plan, rank));
        group.finish();
        assert!(group.members[0].says("leads"));
        let windows = plan.windows();
        let wanted = windows
            .iter()
            .filter(|each| !each.wanted.is_empty() && each.window.buffer_bytes > 0);
        let calls: u64 = group.members.iter().map(|one| one.number("calls")).sum();
        assert_eq!(calls, wanted.count() as u64, "a window was begun twice");
        for one in &group.members {
            assert!(one.says("ended") && !one.says("alone"), "{:?}", one.lines());
        }
    }

    #[test]
    fn a_member_that_never_comes_is_not_waited_for_longer_than_agreed() {
        let plan = Plan::new(5, 3).join_ms(2500);
        let begin = Instant::now();
        let mut group = Group::start(&plan, 0..2);
        group.finish();
        assert!(begin.elapsed() < Duration::from_secs(20));
        for one in &group.members {
            assert!(
                one.says("members 2") && !one.says("alone"),
                "{:?}",
                one.lines()
            );
        }
        // All alone.
        let mut group = Group::start(&plan, 1..2);
        group.finish();
        assert!(group.members[0].says("alone the start: nobody else joined within 2.5s"));
        assert!(group.members[0].says("leads"));
    }

    #[test]
    fn a_late_comer_reads_alone() {
        let plan = Plan::new(6, 3).join_ms(2500).delay_ms(10);
        let mut group = Group::start(&plan, 0..2);
        group.wait_for(0, "got");
        group.add(&plan, 2);
        group.finish();
        assert!(
            group.members[2].says("alone the start"),
            "{:?}",
            group.members[2].lines()
        );
        assert!(!group.members[0].says("alone") && !group.members[1].says("alone"));
    }

    /// Of a group of 3, kills or stops one when it says something, and looks at the others.
    fn lose(plan: &Plan, leader: bool, cue: &str, signal: Signal) -> (Group, usize) {
        let mut group = Group::start(plan, 0..1);
        group.wait_for_name();
        group.add(plan, 1);
        group.add(plan, 2);
        let lost = usize::from(!leader);
        group.wait_for(lost, cue);
        group.signal(lost, signal);
        let begin = Instant::now();
        for index in 0..3 {
            if index != lost {
                group.finish_one(index);
            }
        }
        assert!(
            begin.elapsed() < Duration::from_secs(30),
            "{:?}",
            begin.elapsed()
        );
        (group, lost)
    }

    #[test]
    fn a_member_killed_while_it_reads_is_replaced() {
        let plan = Plan::new(7, 3).hang(1, 3);
        let (mut group, lost) = lose(&plan, false, "hangs", Signal::KILL);
        group.reap(lost);
        for index in [0, 2] {
            let one = &group.members[index];
            assert!(one.says("ended") && !one.says("alone"), "{:?}", one.lines());
            assert_eq!(one.number("died"), 1);
        }
        group.assert_nothing_left();
    }

    #[test]
    fn a_member_killed_while_it_holds_leases_is_forgotten() {
        let plan = Plan::new(8, 3).hold(1, 2).everyone();
        let (mut group, lost) = lose(&plan, false, "holds", Signal::KILL);
        group.reap(lost);
        for index in [0, 2] {
            let one = &group.members[index];
            assert!(one.says("ended") && !one.says("alone"), "{:?}", one.lines());
        }
        group.assert_nothing_left();
    }

    #[test]
    fn without_their_leader_members_read_the_rest_alone() {
        let plan = Plan::new(9, 3).delay_ms(5).everyone();
        let (mut group, lost) = lose(&plan, true, "got", Signal::KILL);
        group.reap(lost);
        for index in [1, 2] {
            let one = &group.members[index];
            assert!(one.says("ended"), "{:?}", one.lines());
            assert!(one.says("rank 0, which led, is gone"), "{:?}", one.lines());
        }
        group.assert_nothing_left();
    }

    #[test]
    fn a_stopped_member_is_taken_out_and_finds_its_way_when_it_wakes_up() {
        let plan = Plan::new(10, 3).hold(1, 2).everyone().silence_ms(2500);
        let (mut group, stopped) = lose(&plan, false, "holds", Signal::STOP);
        for index in [0, 2] {
            let one = &group.members[index];
            assert!(one.says("ended") && !one.says("alone"), "{:?}", one.lines());
            assert_eq!(one.number("died"), 1);
        }
        // Its leases are checked again before they are dropped.
        group.signal(stopped, Signal::CONT);
        group.release(stopped);
        group.finish_one(stopped);
        let one = &group.members[stopped];
        assert!(
            one.says("ended") && one.says("nothing was heard of it for 2.5s"),
            "{:?}",
            one.lines()
        );
        group.assert_nothing_left();
    }

    #[test]
    fn a_stopped_leader_is_not_waited_for() {
        let plan = Plan::new(11, 3).delay_ms(5).everyone().silence_ms(2500);
        let (mut group, stopped) = lose(&plan, true, "got", Signal::STOP);
        for index in [1, 2] {
            let one = &group.members[index];
            assert!(one.says("ended"), "{:?}", one.lines());
            assert!(
                one.says("nothing was heard of the leader for 2.5s"),
                "{:?}",
                one.lines()
            );
        }
        group.signal(stopped, Signal::CONT);
        group.finish_one(stopped);
        assert!(group.members[stopped].says("ended"));
        group.assert_nothing_left();
    }

    #[test]
    fn a_group_that_is_stopped_as_a_whole_goes_on_as_a_whole() {
        let plan = Plan::new(12, 3).delay_ms(5).everyone().silence_ms(2500);
        let mut group = Group::start(&plan, 0..3);
        group.wait_for(0, "got");
        (0..3).for_each(|index| group.signal(index, Signal::STOP));
        std::thread::sleep(Duration::from_millis(4000));
        (0..3).for_each(|index| group.signal(index, Signal::CONT));
        group.finish();
        for one in &group.members {
            assert!(one.says("ended") && !one.says("alone"), "{:?}", one.lines());
        }
    }

    #[test]
    fn whoever_holds_leases_for_too_long_is_told_and_the_others_go_on() {
        let plan = Plan::new(13, 3).hold(1, 2).everyone().lease_ms(5000);
        let mut group = Group::start(&plan, 0..3);
        group.wait_for(1, "holds");
        group.finish_one(0);
        group.finish_one(2);
        for index in [0, 2] {
            assert!(
                group.members[index].says("ended"),
                "{:?}",
                group.members[index].lines()
            );
        }
        group.release(1);
        group.finish_one(1);
        let one = &group.members[1];
        assert!(
            one.says("error rank 1 was taken out of the group"),
            "{:?}",
            one.lines()
        );
        assert!(one.says("the others waited 5.0s"), "{:?}", one.lines());
        group.assert_nothing_left();
    }

    #[test]
    fn what_one_cannot_read_is_told_to_all_that_want_it() {
        let plan = Plan::new(14, 3).fail(4).everyone();
        let mut group = Group::start(&plan, 0..3);
        group.finish();
        let errors: Vec<&str> = group
            .members
            .iter()
            .filter_map(|one| one.line("error "))
            .collect();
        assert_eq!(errors.len(), 3, "{errors:?}");
        let own = errors
            .iter()
            .min_by_key(|error| error.len())
            .unwrap()
            .trim_start_matches("error ");
        assert!(
            own.starts_with("read ") && own.contains(" at offset "),
            "{own}"
        );
        assert!(
            errors.iter().all(|error| error.ends_with(own)),
            "{errors:?}"
        );
        let peers = errors
            .iter()
            .filter(|error| error.contains(", which read for all, failed: "));
        assert_eq!(peers.count(), 2, "{errors:?}");
        for one in &group.members {
            assert!(one.says("got 3") && !one.says("got 4"), "{:?}", one.lines());
        }
    }

    #[test]
    fn members_that_panic_or_are_cancelled_leave_and_the_others_go_on() {
        for plan in [Plan::new(15, 3).panic(1, 2), Plan::new(16, 3).cancel(1, 2)] {
            let plan = plan.everyone().delay_ms(2);
            let mut group = Group::start(&plan, 0..1);
            group.wait_for_name();
            group.add(&plan, 1);
            group.add(&plan, 2);
            group.finish();
            for index in [0, 2] {
                let one = &group.members[index];
                assert!(one.says("ended") && !one.says("alone"), "{:?}", one.lines());
            }
            let one = &group.members[1];
            assert!(
                one.says("panicked") || one.says("error cancelled"),
                "{:?}",
                one.lines()
            );
        }
    }

    #[test]
    fn who_does_not_fit_is_refused_and_the_members_know() {
        let plan = Plan::new(17, 3).join_ms(3000);
        let mut group = Group::start(&plan, 0..1);
        group.wait_for_name();
        for (other, rank, what) in [
            (
                plan.clone().fingerprint("other"),
                1,
                "the fingerprints differ",
            ),
            (
                plan.clone().world(4),
                1,
                "rank 1 is of a world of 4, and rank 0, which leads, of one of 3",
            ),
            (plan.clone(), 0, "there is a member with rank 0 already"),
            (
                plan.clone().seed(18),
                1,
                "cut what it reads into other windows",
            ),
        ] {
            let index = group.add(&other, rank);
            group.finish_one(index);
            let one = &group.members[index];
            assert!(one.says(&format!(
                "error the group {:?} refused rank {rank}: ",
                plan.name()
            )));
            assert!(one.says(what), "{:?}", one.lines());
        }
        group.add(&plan, 2);
        group.finish_one(0);
        assert_eq!(
            group.members[0].number("rejected"),
            4,
            "{:?}",
            group.members[0].lines()
        );
        assert!(group.members[0].says("rejected because there is a member with rank 0 already"));
        group.finish();
    }

    #[test]
    fn another_user_can_neither_take_part_nor_pose_as_the_leader() {
        if !rustix::process::geteuid().is_root() {
            println!("skipped: only root can start processes of another user");
            return;
        }
        let plan = Plan::new(19, 2).join_ms(1500);
        let mut group = Group::start(&plan, 0..1);
        group.wait_for_name();
        let mut intruder = group.other_user(&plan, "processes::intruder_process");
        assert!(intruder.wait().unwrap().success());
        group.finish();
        assert!(
            group.members[0].says(
                "rejected because it is one of user 0, and this process is one of user 65534"
            )
        );

        let plan = Plan::new(20, 2).join_ms(500);
        let mut group = Group::new(&plan);
        let mut squatter = group.other_user(&plan, "processes::squatter_process");
        group.wait_for_name();
        group.add(&plan, 0);
        group.finish_one(0);
        squatter.kill().unwrap();
        squatter.wait().unwrap();
        let one = &group.members[0];
        assert!(
            one.says("ended")
                && one.says("alone the start: its name is taken by a process of user 65534"),
            "{:?}",
            one.lines()
        );
        group.assert_nothing_left();
    }

    #[test]
    fn random_groups_lose_random_members_at_random_moments() {
        let seed = std::env::var("TENSORA_SHARED_SEED")
            .ok()
            .and_then(|seed| seed.parse().ok());
        let fixed = seed.is_some();
        let first = seed.unwrap_or_else(|| {
            let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
            u64::from(now.unwrap().subsec_nanos())
        });
        let rounds = if fixed { 1 } else { 30 };
        for seed in (first..).take(rounds) {
            println!("TENSORA_SHARED_SEED={seed}");
            let mut rng = Rng::new(seed);
            let world = 1 + rng.below(5) as u32;
            let plan = Plan::new(seed, world)
                .delay_ms(1 + rng.below(8))
                .consume_ms(rng.below(3))
                .buffers(1 + rng.below(6) as u32)
                .readers(1 + rng.below(3) as u32)
                .join_ms(1500)
                .silence_ms(2000);
            let mut group = Group::start(&plan, 0..world);
            let mut killed = Vec::new();
            for index in 0..world as usize {
                if rng.below(2) == 0 {
                    // Before it joins, or somewhere in the middle, or after its end.
                    match rng.below(4) {
                        0 => std::thread::sleep(Duration::from_millis(rng.below(30))),
                        _ => group.wait_for_lines(index, rng.below(40) as usize),
                    }
                    group.signal(index, Signal::KILL);
                    killed.push(index);
                }
            }
            for index in 0..world as usize {
                if killed.contains(&index) {
                    group.reap(index);
                } else {
                    group.finish_one(index);
                    let one = &group.members[index];
                    assert!(one.says("ended"), "seed {seed}: {:?}", one.lines());
                }
            }
            group.assert_nothing_left();
        }
    }
}
