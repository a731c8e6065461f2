use std::fs::{self, OpenOptions};
use std::process::Stdio;

use crate::support::{args, run, single, tensora};

#[test]
fn version_and_help_succeed() {
    let version = run(["--version"]).text();
    assert_eq!(version, format!("tensora {}\n", env!("CARGO_PKG_VERSION")));
    let help = run(["--help"]).text();
    for command in [
        "inspect",
        "plan",
        "load",
        "convert",
        "verify",
        "doctor",
        "calibrate",
        "bench",
    ] {
        let line = help
            .lines()
            .find(|line| line.trim_start().starts_with(command));
        assert!(line.is_some(), "{command}: {help}");
        let of_command = run([command, "--help"]).text();
        assert!(of_command.contains("Examples:"), "{of_command}");
        assert!(of_command.contains("--json"), "{of_command}");
    }
    // The contract that the command takes on for its user is told to its user.
    let load = run(["load", "--help"]).text();
    for word in ["truncate", "SIGBUS", "--memory owned"] {
        assert!(load.contains(word), "{word}: {load}");
    }
}

#[test]
fn slips_are_answered_with_a_suggestion() {
    for (arguments, tip) in [
        (&["laod", "x"][..], "'load'"),
        (&["load", "x", "--memry", "owned"], "'--memory'"),
        (&["load", "x", "--backend", "io_uring"], "'io-uring'"),
        (&["load", "x", "--direct", "require"], "'required'"),
        (&["load", "x", "--cache", "bypas"], "'bypass'"),
        (&["inspect", "x", "--format", "safetensor"], "'safetensors'"),
    ] {
        let error = run(arguments).failure(2);
        assert!(error.contains("tip: ") && error.contains(tip), "{error}");
    }
}

#[test]
fn values_out_of_range_are_wrong_usage() {
    for (option, help) in [
        ("--chunk-bytes=1", "4KiB"),
        ("--chunk-bytes=2GiB", "1GiB"),
        ("--chunk-bytes=lots", "1MiB"),
        ("--queue-depth=0", "1..=1024"),
        ("--workers=257", "1..=256"),
        ("--memory-limit=-1", "such as 1MiB"),
        ("--rank=-1", "'--rank <N>'"),
    ] {
        let error = run(["load", "x", option, "--json"]).failure(2);
        assert!(error.contains(help), "{option}: {error}");
    }
}

#[test]
fn nothing_to_do_is_wrong_usage() {
    let answer = run([""; 0]);
    assert_eq!(answer.status, Some(2));
    assert!(answer.stderr.contains("Usage: tensora"), "{answer:?}");
    assert!(run(["load"]).failure(2).contains("<PATH>"));
}

#[test]
fn errors_name_cause_and_remedy_whatever_the_output() {
    let (directory, path) = single();
    let empty = tempfile::tempdir().unwrap();
    let truncated = directory.path().join("truncated.safetensors");
    fs::copy(&path, &truncated).unwrap();
    let file = OpenOptions::new().write(true).open(&truncated).unwrap();
    let bytes = file.metadata().unwrap().len();
    file.set_len(bytes - 100).unwrap();

    let absent = empty.path().join("absent");
    for command in ["inspect", "plan", "load"] {
        for (path, words) in [
            (&absent, &["no such file", "absent"][..]),
            (
                &empty.path().to_owned(),
                &["no checkpoint here", "looked for"],
            ),
            (&truncated, &["100 bytes missing", "damaged", "again"]),
        ] {
            for json in [&[][..], &["--json"]] {
                let arguments = args![command, path];
                let json = json.iter().map(std::ffi::OsString::from);
                let error = run(arguments.into_iter().chain(json)).failure(1);
                for word in words {
                    assert!(error.contains(word), "{command} {word}: {error}");
                }
            }
        }
    }
}

#[test]
fn bad_patterns_fail() {
    let (_directory, path) = single();
    for command in ["inspect", "plan", "load"] {
        let error = run(args![command, path, "--select", "model.["]).failure(1);
        assert!(error.contains("not a valid glob"), "{error}");
        let error = run(args![
            command,
            path,
            "--select",
            "*",
            "--select",
            "nothing.*"
        ])
        .failure(1);
        assert!(
            error.contains("\"nothing.*\" matches none of the 8"),
            "{error}"
        );
    }
}

#[test]
fn long_arguments_do_not_bury_the_message() {
    let (directory, path) = single();
    let long = "x".repeat(50_000);
    let error = run(args!["load", path, "--select", long]).failure(1);
    assert!(error.len() < 1000, "{error}");
    assert!(
        error.contains("characters)") && error.contains("matches none"),
        "{error}"
    );
    let error = run(args!["inspect", directory.path().join(&long)]).failure(1);
    assert!(
        error.len() < 1000 && error.contains("characters)"),
        "{error}"
    );
}

/// Neither names of tensors nor paths can steer the terminal.
#[test]
fn what_is_not_seen_is_escaped() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("evil.safetensors");
    let name = "a\u{202e}b\u{2028}c\u{200b}d";
    let header = format!(r#"{{"{name}":{{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}}}"#);
    let mut contents = (header.len() as u64).to_le_bytes().to_vec();
    contents.extend(header.as_bytes());
    contents.push(0);
    fs::write(&path, contents).unwrap();
    let text = run(args!["inspect", path]).text();
    assert!(text.contains("a\\u{202e}b\\u{2028}c\\u{200b}d"), "{text}");
    let json = run(args!["inspect", path, "--json"]).json();
    assert_eq!(json["tensors"][0]["name"], name);
    let absent = directory.path().join("\u{1b}[2J\u{202e}");
    let error = run(args!["inspect", absent]).failure(1);
    assert!(error.contains("\\u{1b}[2J\\u{202e}"), "{error}");
}

#[test]
fn contradictions_are_refused_with_a_way_out() {
    let (_directory, path) = single();
    for (options, hint) in [
        (&["--backend=sync", "--memory=mapped"][..], "--memory owned"),
        (
            &["--backend=mmap", "--direct=required"],
            "any backend but mmap",
        ),
        (&["--memory=mapped", "--direct=required"], "--memory owned"),
        (
            &["--memory=owned", "--memory-limit=1KiB"],
            "`--memory-limit SIZE`",
        ),
        (&["--cache=keep", "--direct=required"], "--direct auto"),
        (&["--cache=bypass", "--direct=never"], "`required`"),
        (&["--cache=bypass", "--memory=mapped"], "--memory owned"),
        (
            &["--cache=bypass", "--backend=mmap"],
            "any backend but mmap",
        ),
    ] {
        let options = options.iter().map(std::ffi::OsString::from);
        let error = run(args!["load", path].into_iter().chain(options)).failure(1);
        let line = error.lines().find(|line| line.starts_with("hint: "));
        assert!(line.is_some_and(|line| line.contains(hint)), "{error}");
    }
}

#[test]
fn a_closed_pipe_ends_quietly() {
    let (_directory, path) = single();
    for command in [
        &["inspect"][..],
        &["inspect", "--json"],
        &["doctor", "--json"],
        &["plan"],
        &["load"],
        &["doctor"],
    ] {
        // Nobody reads: the first write already fails.
        let (reader, writer) = std::io::pipe().unwrap();
        drop(reader);
        let output = tensora()
            .args(command)
            .arg(&path)
            .stdout(writer)
            .stderr(Stdio::piped())
            .output()
            .unwrap();
        let expected = if command.contains(&"--json") { 141 } else { 0 };
        assert_eq!(output.status.code(), Some(expected), "{output:?}");
        assert_eq!(output.stderr, b"", "{output:?}");
    }
}

/// A result that is lost is a failure, unlike one that nobody wants.
#[cfg(target_os = "linux")]
#[test]
fn a_full_disk_is_a_failure() {
    let (_directory, path) = single();
    let full = OpenOptions::new().write(true).open("/dev/full").unwrap();
    let output = tensora().arg("inspect").arg(&path).stdout(full).output();
    let output = output.unwrap();
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1), "{stderr}");
    assert!(
        stderr.starts_with("error: could not write to standard output"),
        "{stderr}"
    );
}

#[cfg(target_os = "linux")]
#[test]
fn paths_need_not_be_utf_8() {
    use std::os::unix::ffi::OsStrExt;

    let (directory, path) = single();
    let odd = directory
        .path()
        .join(std::ffi::OsStr::from_bytes(b"odd-\xff"));
    fs::create_dir(&odd).unwrap();
    fs::rename(&path, odd.join("model.safetensors")).unwrap();
    for command in ["inspect", "plan", "load", "doctor"] {
        run(args![command, odd, "--json"]).json();
        run(args![command, odd]).text();
    }
}
