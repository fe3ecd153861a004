//! The OpenAPI document says what the server does: each path and each method, in both directions.

use std::collections::BTreeSet;

use serde_json::Value;

use crate::rig::Rig;

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
        let target = path
            .replace("{disk}", "none")
            .replace("{snapshot}", "no@ne")
            .replace("{id}", "0")
            .replace("{volume}", "none")
            .replace("{bookmark}", "no@ne");
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

/// What a route does not describe it does not take: query keys, a body, methods.
#[test]
fn every_route_refuses_what_it_does_not_describe() {
    let rig = Rig::with_disks();
    let document = rig.get("/v1/openapi.json").json();
    for (path, operations) in document["paths"].as_object().unwrap() {
        let target = path.replace("{disk}", "vm1").replace("{id}", "1").replace("{volume}", "vm1");
        let target = target.replace("{snapshot}", "vm1@x").replace("{bookmark}", "vm1@x");
        for (method, operation) in operations.as_object().unwrap() {
            let method = method.to_uppercase();
            let body = if operation["requestBody"].is_object() { "{}" } else { "" };
            let problem = rig.refused(&method, &format!("{target}?bogus=1"), body);
            assert_eq!(problem["code"], "invalid-request", "{method} {path}");
            assert!(problem["detail"].as_str().unwrap().contains("\"bogus\""), "{method} {path}: {problem}");
            if body.is_empty() {
                let problem = rig.refused(&method, &target, "{}");
                assert_eq!(problem["code"], "invalid-request", "{method} {path}");
                assert!(problem["detail"].as_str().unwrap().ends_with("takes no body"), "{method} {path}: {problem}");
            } else {
                let problem = rig.refused(&method, &target, r#"{"bogus":1}"#);
                assert!(problem["detail"].as_str().unwrap().contains("`bogus`"), "{method} {path}: {problem}");
            }
        }
        let described = |method: &str| operations.get(method.to_lowercase()).is_some();
        for method in ["GET", "PUT", "POST", "PATCH", "DELETE", "BREW"].into_iter().filter(|m| !described(m)) {
            let answer = rig.send(method, &target, "");
            assert_eq!(answer.status, 405, "{method} {path}");
            let allowed: BTreeSet<&str> = answer.header("allow").unwrap().split(',').map(str::trim).collect();
            let methods: BTreeSet<String> = operations.as_object().unwrap().keys().map(|m| m.to_uppercase()).collect();
            assert!(methods.iter().all(|m| allowed.contains(m.as_str())), "{method} {path}: {allowed:?}");
            assert!(!allowed.contains(method), "{method} {path}: {allowed:?}");
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
    for schema in [
        "Leg",
        "MirrorRequest",
        "RestoreDisk",
        "RestoreStatus",
        "Disk",
        "DiskConfig",
        "DiskPatch",
        "RenameRequest",
        "ResizeRequest",
        "GroupDeletion",
        "Claim",
        "Unserved",
        "Snapshot",
        "CreateSnapshots",
        "Volume",
        "CreateVolume",
        "Bookmark",
        "ByteRange",
        "VolumeMap",
        "VolumeStatus",
        "Job",
        "JobPatch",
        "Event",
        "Status",
        "Problem",
        "Settings",
    ] {
        let schema_of = &document["components"]["schemas"][schema];
        let parts = schema_of["allOf"].as_array().cloned().unwrap_or_else(|| vec![schema_of.clone()]);
        assert!(parts.iter().any(|part| part["properties"].is_object()), "{schema}");
    }
    let words = &document["components"]["schemas"]["SnapshotState"]["enum"];
    assert_eq!(words, &serde_json::json!(["draining", "quiesced", "folding", "deleting", "broken"]));
    for (schema, words) in [
        ("VolumeState", serde_json::json!(["serving", "disabled", "broken"])),
        ("LegState", serde_json::json!(["in-sync", "resynchronising", "failed", "split"])),
        ("JobKind", serde_json::json!(["fold", "merge", "migrate", "update", "mirror", "restore"])),
    ] {
        assert_eq!(document["components"]["schemas"][schema]["enum"], words);
    }
}

#[test]
fn every_query_key_is_described() {
    let document = Rig::new().get("/v1/openapi.json").json();
    for (path, method, keys) in [
        ("/v1/disks/{disk}", "delete", &["force"][..]),
        ("/v1/volumes/{volume}", "delete", &["force"]),
        ("/v1/volumes/{volume}/complete", "post", &["delay_ms", "bytes_per_second"]),
        ("/v1/volumes/{volume}/update", "post", &["force", "delay_ms", "bytes_per_second"]),
        ("/v1/volumes/{volume}/disable", "post", &["force"]),
        ("/v1/volumes/{volume}/enable", "post", &["fresh"]),
        ("/v1/disks/{disk}/mirror", "delete", &["leg"]),
        ("/v1/snapshots/{snapshot}", "delete", &["force", "keep-image", "keep-bookmark", "wait_timeout_ms"]),
        ("/v1/snapshots", "delete", &["force", "keep-bookmark", "wait_timeout_ms"]),
        ("/v1/snapshots", "get", &["disk", "state", "group", "strategy", "name", "limit", "after"]),
        ("/v1/disks", "get", &["state", "name", "limit", "after"]),
        ("/v1/volumes", "get", &["from", "state", "limit", "after"]),
        ("/v1/bookmarks", "get", &["disk", "state", "limit", "after"]),
        ("/v1/jobs", "get", &["kind", "state", "disk", "limit", "after"]),
        ("/v1/snapshots/{snapshot}/diff", "get", &["to"]),
        ("/v1/volumes/{volume}/diff", "get", &["to"]),
        ("/v1/snapshots/{snapshot}/cutover", "post", &["wait", "wait_timeout_ms"]),
    ] {
        let parameters = document["paths"][path][method]["parameters"].as_array().unwrap();
        let query = parameters.iter().filter(|parameter| parameter["in"] == "query" && parameter["required"] == false);
        let described: Vec<_> = query.map(|parameter| parameter["name"].as_str().unwrap()).collect();
        assert_eq!(described, keys, "{method} {path}");
    }
}

#[test]
fn every_route_event_and_query_key_is_on_the_page() {
    let page = include_str!("../../docs/control-api.md");
    let document = Rig::new().get("/v1/openapi.json").json();
    for (path, operations) in document["paths"].as_object().unwrap() {
        let path = path.replace("{snapshot}", "{disk}@{name}").replace("{bookmark}", "{disk}@{name}");
        for (method, operation) in operations.as_object().unwrap() {
            let row = format!("| `{} {path}", method.to_uppercase());
            let line = page.lines().find(|line| line.starts_with(&row) && !line[row.len()..].starts_with(['/', '{']));
            let line = line.unwrap_or_else(|| panic!("docs/control-api.md lacks the row {row:?}"));
            for parameter in operation["parameters"].as_array().into_iter().flatten() {
                let key = parameter["name"].as_str().unwrap();
                assert!(parameter["in"] != "query" || line.contains(&format!("{key}=")), "{key} in {line}");
            }
        }
    }
    for kind in document["components"]["schemas"]["EventKind"]["enum"].as_array().unwrap() {
        assert!(page.contains(&format!("`{}`", kind.as_str().unwrap())), "docs/control-api.md lacks {kind}");
    }
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
