//! What the repository's README shows works as it stands there.

use std::path::Path;

use crate::support::{Answer, available, sharded, tensora};

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
    for arguments in commands {
        if arguments.iter().any(|word| word == "io-uring")
            && !available(tensora::BackendKind::IoUring, "a command of the README")
        {
            continue;
        }
        let answer: Answer = tensora()
            .current_dir(folder.path())
            .args(&arguments)
            .output()
            .unwrap()
            .into();
        let shown = arguments.join(" ");
        assert_eq!(answer.status, Some(0), "tensora {shown}: {answer:?}");
        assert!(!answer.stdout.is_empty(), "tensora {shown}");
    }
}
