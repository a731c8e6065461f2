use std::fs;

use serde_json::{Value, json};

use crate::support::{
    TENSOR_COUNT, args, assert_fields, data_bytes, run, sharded, single, strided,
};

const FIELDS: &[(&str, &str)] = &[
    ("format", "string"),
    ("root", "string"),
    ("tensor_count", "count"),
    ("data_bytes", "count"),
    ("parameter_count", "count"),
    ("dtypes", "array"),
    ("files", "array"),
    ("tensors", "array"),
    ("metadata", "object"),
    ("notes", "array"),
];

fn names(inspection: &Value) -> Vec<&str> {
    let tensors = inspection["tensors"].as_array().unwrap();
    tensors
        .iter()
        .map(|tensor| tensor["name"].as_str().unwrap())
        .collect()
}

#[test]
fn json_has_every_field_of_the_contract() {
    let directory = sharded();
    let inspection = run(args!["inspect", directory.path(), "--json"]).json();
    assert_fields(&inspection, FIELDS);
    assert_eq!(inspection["format"], "safetensors");
    assert_eq!(inspection["tensor_count"], TENSOR_COUNT);
    assert_eq!(inspection["data_bytes"], data_bytes());
    assert_eq!(inspection["metadata"], json!({"format": "pt"}));
    assert_eq!(inspection["notes"], json!([]));

    let files = inspection["files"].as_array().unwrap();
    assert_eq!(files.len(), 3);
    let paths: Vec<_> = files.iter().map(|file| &file["path"]).collect();
    for file in files {
        assert_fields(file, &[("path", "string"), ("bytes", "count")]);
        let path = directory.path().join(file["path"].as_str().unwrap());
        assert_eq!(file["bytes"], fs::metadata(path).unwrap().len());
    }
    let tensors = inspection["tensors"].as_array().unwrap();
    assert_eq!(tensors.len(), TENSOR_COUNT);
    for tensor in tensors {
        assert_fields(
            tensor,
            &[
                ("name", "string"),
                ("dtype", "string"),
                ("shape", "array"),
                ("file", "string"),
                ("offset", "count"),
                ("bytes", "count"),
            ],
        );
        assert_eq!(tensor.get("strides"), None, "{tensor}");
        assert!(paths.contains(&&tensor["file"]), "{tensor}");
    }
    let sum: u64 = tensors.iter().map(|t| t["bytes"].as_u64().unwrap()).sum();
    assert_eq!(sum, data_bytes());
    let of_dtypes = inspection["dtypes"].as_array().unwrap();
    let sum: u64 = of_dtypes
        .iter()
        .map(|d| d["data_bytes"].as_u64().unwrap())
        .sum();
    assert_eq!(sum, data_bytes());
}

#[test]
fn the_ranges_hold_the_data() {
    let (_directory, path) = single();
    let inspection = run(args!["inspect", path, "--json"]).json();
    let contents = fs::read(&path).unwrap();
    let reference = safetensors::SafeTensors::deserialize(&contents).unwrap();
    for tensor in inspection["tensors"].as_array().unwrap() {
        let offset = usize::try_from(tensor["offset"].as_u64().unwrap()).unwrap();
        let bytes = usize::try_from(tensor["bytes"].as_u64().unwrap()).unwrap();
        let expected = reference.tensor(tensor["name"].as_str().unwrap()).unwrap();
        assert_eq!(
            &contents[offset..offset + bytes],
            expected.data(),
            "{tensor}"
        );
        assert_eq!(tensor["dtype"], expected.dtype().to_string());
    }
}

#[test]
fn strides_are_given_where_there_are_any() {
    let directory = strided();
    let inspection = run(args!["inspect", directory.path(), "--json"]).json();
    assert_eq!(inspection["format"], "serverlessllm-store");
    assert_eq!(inspection["tensors"][0].get("strides"), None);
    assert_eq!(inspection["tensors"][1]["strides"], json!([1, 3]));
    let notes = inspection["notes"].to_string();
    assert!(notes.contains("transposed"), "{notes}");

    let text = run(args!["inspect", directory.path()]).text();
    assert!(text.contains("[3, 2] strides [1, 3]"), "{text}");
    assert!(text.contains("note: not contiguous (1): "), "{text}");
}

#[test]
fn a_selection_narrows_tensors_and_counts() {
    let directory = sharded();
    let select = |pattern: &str| {
        let answer = run(args![
            "inspect",
            directory.path(),
            "--select",
            pattern,
            "--json"
        ]);
        answer.json()
    };
    let layers = select("model.layers.{0,1}.mlp.*");
    assert_eq!(
        names(&layers),
        ["model.layers.0.mlp.weight", "model.layers.1.mlp.weight"]
    );
    assert_eq!(layers["tensor_count"], 2);
    assert_eq!(layers["data_bytes"], 2 * 128 * 64 * 2);
    assert_eq!(layers["parameter_count"], 2 * 128 * 64);
    // The checkpoint has all its files, selected from or not.
    assert_eq!(layers["files"].as_array().unwrap().len(), 3);

    let text = run(args!["inspect", directory.path(), "--select", "lm_head.*"]).text();
    assert!(text.contains("1 selected of 8"), "{text}");
    assert!(!text.contains("model.norm.weight"), "{text}");
}

#[test]
fn long_tables_are_cut_and_say_so() {
    let directory = tempfile::tempdir().unwrap();
    let entries: Vec<String> = (0..45)
        .map(|i| {
            format!(
                r#""t{i:02}":{{"dtype":"U8","shape":[1],"data_offsets":[{i},{}]}}"#,
                i + 1
            )
        })
        .collect();
    let header = format!("{{{}}}", entries.join(","));
    let mut file = (header.len() as u64).to_le_bytes().to_vec();
    file.extend_from_slice(header.as_bytes());
    file.extend_from_slice(&[7; 45]);
    let path = directory.path().join("model.safetensors");
    fs::write(&path, file).unwrap();

    let text = run(args!["inspect", path]).text();
    assert!(text.contains("t39") && !text.contains("t40"), "{text}");
    assert!(text.ends_with("… 5 more, --all shows them\n"), "{text}");
    let text = run(args!["inspect", path, "--all"]).text();
    assert!(text.contains("t44") && !text.contains("more"), "{text}");
    assert_eq!(
        names(&run(args!["inspect", path, "--json"]).json()).len(),
        45
    );
}

#[test]
fn people_get_aligned_columns() {
    let (_directory, path) = single();
    let text = run(args!["inspect", path]).text();
    for line in [
        "format      safetensors",
        "tensors     8, 94.8 KiB (97,091 bytes)",
    ] {
        assert!(text.lines().any(|found| found == line), "{line}: {text}");
    }
    assert!(text.lines().all(|line| line == line.trim_end()), "{text}");
    // Numbers end in one column, the last one of the table.
    let mut rows = text.lines().skip_while(|line| !line.starts_with("tensor "));
    let width = rows.next().unwrap().chars().count();
    assert_eq!(rows.next().unwrap(), "─".repeat(width + 1));
    let widths: Vec<_> = rows.map(|row| row.chars().count()).collect();
    assert_eq!(widths, [width; TENSOR_COUNT], "{text}");
}

#[test]
fn names_cannot_steer_the_terminal() {
    let directory = tempfile::tempdir().unwrap();
    let header = r#"{"evil\u001b[2J":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}"#;
    let mut file = (header.len() as u64).to_le_bytes().to_vec();
    file.extend_from_slice(header.as_bytes());
    file.push(0);
    let path = directory.path().join("model.safetensors");
    fs::write(&path, file).unwrap();
    let text = run(args!["inspect", path]).text();
    assert!(text.contains(r"evil\u{1b}[2J"), "{text}");
    assert!(!text.contains('\u{1b}'), "{text}");
    // Machines get the name as it is.
    assert_eq!(
        names(&run(args!["inspect", path, "--json"]).json()),
        ["evil\u{1b}[2J"]
    );
}

#[test]
fn what_the_index_does_not_list_can_be_ignored() {
    let directory = sharded();
    let path = directory.path().join("model.safetensors.index.json");
    let mut index: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    let map = index["weight_map"].as_object_mut().unwrap();
    map.remove("model.norm.weight").unwrap();
    fs::write(&path, index.to_string()).unwrap();

    let error = run(args!["inspect", directory.path()]).failure(1);
    assert!(error.contains("model.norm.weight"), "{error}");
    assert!(error.contains("hint: `--ignore-unlisted`"), "{error}");
    let inspection = run(args![
        "inspect",
        directory.path(),
        "--ignore-unlisted",
        "--json"
    ])
    .json();
    assert_eq!(inspection["tensor_count"], TENSOR_COUNT - 1);
    assert!(
        inspection["notes"]
            .to_string()
            .contains("model.norm.weight")
    );
}

#[test]
fn ranks_open_together_or_alone() {
    let directory = tempfile::tempdir().unwrap();
    for rank in ["rank_0", "rank_1"] {
        let source = strided();
        fs::create_dir(directory.path().join(rank)).unwrap();
        for name in ["tensor_index.json", "tensor.data_0"] {
            let target = directory.path().join(rank).join(name);
            fs::copy(source.path().join(name), target).unwrap();
        }
    }
    let all = run(args!["inspect", directory.path(), "--json"]).json();
    assert_eq!(all["tensor_count"], 4);
    let one = run(args!["inspect", directory.path(), "--rank", "1", "--json"]).json();
    assert_eq!(names(&one), ["plain", "transposed"]);
}

#[test]
fn the_format_can_be_insisted_on() {
    let (_directory, path) = single();
    let inspect = |format: &str| run(args!["inspect", path, "--format", format]);
    inspect("safetensors").text();
    let error = inspect("serverlessllm-store").failure(1);
    assert!(error.contains("hint: without `--format`"), "{error}");
}
