//! What a network sees in pictures, by several runtimes.

#![allow(unreachable_pub, reason = "a module of several test binaries")]

use serde_json::Value;
use support::{Cluster, python, root};

/// What each answer's logits are, as `gleaner classify` and the browser write them.
pub fn logits(answers: &[Value]) -> Vec<Vec<f64>> {
    let numbers = |answer: &Value| -> Vec<f64> {
        let logits = answer["logits"].as_array().expect("logits");
        logits.iter().map(|logit| logit.as_f64().expect("a number")).collect()
    };
    answers.iter().map(numbers).collect()
}

/// How many pictures two lists of logits take for the same class at once, and by how much of the largest logit of a
/// picture they differ at most.
pub fn compare(ours: &[Vec<f64>], theirs: &[Vec<f64>]) -> (usize, f64) {
    let largest = |logits: &[f64]| (0..logits.len()).max_by(|&a, &b| logits[a].total_cmp(&logits[b]));
    let differ = |(ours, theirs): (&Vec<f64>, &Vec<f64>)| {
        assert_eq!(ours.len(), theirs.len());
        let most = theirs.iter().fold(0.0_f64, |most, logit| most.max(logit.abs()));
        ours.iter().zip(theirs).fold(0.0_f64, |worst, (a, b)| worst.max((a - b).abs() / most))
    };
    assert_eq!(ours.len(), theirs.len());
    let pairs = || ours.iter().zip(theirs);
    let alike = pairs().filter(|(ours, theirs)| largest(ours) == largest(theirs)).count();
    (alike, pairs().map(differ).fold(0.0, f64::max))
}

/// The logits that Python's onnxruntime finds for the pictures of these answers.
pub fn onnxruntime(cluster: &Cluster, model: &str, answers: &[Value]) -> Vec<Vec<f64>> {
    let answers = cluster.write("answers.json", &Value::from(answers).to_string());
    let script = root().join("tests/python/classified.py");
    let output = python("python").arg(script).args([model, &answers]).output().expect("make pytorch");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).expect("JSON")
}
