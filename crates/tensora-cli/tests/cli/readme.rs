//! What the repository's README shows works as it stands there.

use std::path::Path;

use crate::support::{Answer, available, sharded, skip, sparse, tensora};

/// The lines that a user would type: `$ tensora …` in a console block.
fn commands(readme: &str) -> Vec<Vec<String>> {
    readme
        .lines()
        .filter_map(|line| line.strip_prefix("$ tensora "))
        .map(|line| {
            line.split_whitespace()
                .map(|word| word.trim_matches('\'').to_owned())
                .collect()
        })
        .collect()
}

#[test]
fn the_commands_of_the_readme_succeed() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../README.md");
    let commands = commands(&std::fs::read_to_string(path).unwrap());
    assert!(commands.len() >= 5, "the README shows every subcommand");
    let checkpoint = sharded();
    let folder = tempfile::tempdir().unwrap();
    let model = folder.path().join("Qwen3-0.6B");
    std::fs::rename(checkpoint.path(), &model).unwrap();
    // What is measured has to be larger, and nobody waits a minute here for how well.
    let large = folder.path().join("large");
    std::fs::create_dir_all(large.join("Qwen3-0.6B")).unwrap();
    sparse(&large.join("Qwen3-0.6B/model.safetensors"), 33 << 20);
    for mut arguments in commands {
        if arguments.iter().any(|word| word == "io-uring")
            && !available(tensora::BackendKind::IoUring, "a command of the README")
        {
            continue;
        }
        let calibrates = arguments.first().is_some_and(|word| word == "calibrate");
        if calibrates {
            let place = arguments.iter().position(|word| word == "--budget");
            arguments.splice(place.map_or(0..0, |place| place..place + 2), []);
            arguments.extend(["--budget", "1"].map(str::to_owned));
        }
        let answer: Answer = tensora()
            .current_dir(if calibrates { &large } else { folder.path() })
            .env("XDG_CACHE_HOME", folder.path())
            .args(&arguments)
            .output()
            .unwrap()
            .into();
        let shown = arguments.join(" ");
        if answer
            .stderr
            .contains("does not tell what is in the page cache")
        {
            skip("a command of the README", &answer.stderr);
            continue;
        }
        assert_eq!(answer.status, Some(0), "tensora {shown}: {answer:?}");
        assert!(!answer.stdout.is_empty(), "tensora {shown}");
    }
}
