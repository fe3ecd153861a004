//! The OpenAPI document says what the server does: each path and each method, in both directions.

use std::collections::BTreeSet;

use serde_json::Value;

use crate::fake::Rig;

#[test]
fn every_route_and_no_other_is_described() {
    let rig = Rig::with_disks();
    let document = rig.get("/v1/openapi.json").json();
    let described: BTreeSet<&str> = document["paths"].as_object().unwrap().keys().map(String::as_str).collect();
    let source = include_str!("../../src/control/routes.rs");
    let routed: BTreeSet<&str> =
        source.split(".route(\"").skip(1).map(|rest| rest.split('"').next().unwrap()).collect();
    assert!(!routed.is_empty());
    assert_eq!(described, routed);

    for (path, operations) in document["paths"].as_object().unwrap() {
        let target = path.replace("{disk}", "none").replace("{snapshot}", "no@ne").replace("{id}", "0");
        for method in ["GET", "PUT", "POST", "PATCH", "DELETE"] {
            if (path.as_str(), method) == ("/v1/events", "GET") {
                continue;
            }
            let described = operations.get(method.to_lowercase()).is_some();
            let answered = rig.send(method, &target, "").status != 405;
            assert_eq!(described, answered, "{method} {path}");
        }
    }
}

#[test]
fn every_operation_describes_its_refusals() {
    let document = Rig::new().get("/v1/openapi.json").json();
    assert!(document["openapi"].as_str().unwrap().starts_with("3."));
    for (path, operations) in document["paths"].as_object().unwrap() {
        for (method, operation) in operations.as_object().unwrap() {
            let problem = &operation["responses"]["default"]["content"]["application/problem+json"]["schema"]["$ref"];
            assert_eq!(problem, "#/components/schemas/Problem", "{method} {path}");
        }
    }
    for schema in ["Disk", "DiskConfig", "Snapshot", "CreateSnapshots", "Job", "JobPatch", "Event", "Status", "Problem"]
    {
        assert!(document["components"]["schemas"][schema]["properties"].is_object(), "{schema}");
    }
    let words = &document["components"]["schemas"]["SnapshotState"]["enum"];
    assert_eq!(words, &serde_json::json!(["draining", "quiesced", "folding", "deleting", "broken"]));
}

#[test]
fn every_reference_leads_somewhere() {
    fn visit(value: &Value, document: &Value) {
        match value {
            Value::Object(object) => {
                if let Some(target) = object.get("$ref").and_then(Value::as_str) {
                    assert!(document.pointer(target.trim_start_matches('#')).is_some(), "{target}");
                }
                object.values().for_each(|value| visit(value, document));
            }
            Value::Array(array) => array.iter().for_each(|value| visit(value, document)),
            _ => {}
        }
    }
    let document = Rig::new().get("/v1/openapi.json").json();
    visit(&document, &document);
}
