//! What `serve` may be told, and how each mistake is refused.

use super::*;

fn user() -> Environment {
    Environment {
        root: false,
        directory: "/home/u".into(),
        home: Some("/home/u".into()),
        state_home: None,
        runtime_dir: Some("/run/user/7".into()),
    }
}

fn disk(text: &str) -> Result<DiskSpec, String> {
    text.parse::<RawDisk>()?.check(Path::new("/images"))
}

fn options(disks: &[&str]) -> ServeOptions {
    ServeOptions { disks: disks.iter().map(|text| text.parse().unwrap()).collect(), ..ServeOptions::default() }
}

fn file(text: &str) -> Result<FileConfig, String> {
    FileConfig::parse(text, Path::new("/etc/halfsilver/halfsilver.toml")).map_err(|error| error.to_string())
}

#[test]
fn a_disk_with_every_key() {
    let text = "name=vm1,path=vm1.raw,mirror=/other/vm1.raw,shared=on,durability=power,layout=packed,socket=/s/vm1.sock,queues=2,direct=off,serial=S 1,block-size=64K,background=256K";
    let spec = disk(text).unwrap();
    assert_eq!(spec.name.as_str(), "vm1");
    let mut want = DiskConfig::new("/images/vm1.raw");
    want.socket = Some("/s/vm1.sock".into());
    (want.queues, want.direct, want.shared, want.block_size) = (Some(2), false, true, 65_536);
    want.durability = Some(Durability::Power);
    want.layout = Some(Layout::Packed);
    want.background_bytes = Some(256 << 10);
    want.mirror = Some("/other/vm1.raw".into());
    want.serial = Some("S 1".to_owned());
    assert_eq!(spec.config, want);
    assert_eq!(disk("name=vm1,path=vm1.raw").unwrap().config, DiskConfig::new("/images/vm1.raw"));
}

#[test]
fn values_of_each_kind() {
    for (text, on) in [("on", true), ("true", true), ("yes", true), ("off", false), ("false", false), ("no", false)] {
        assert_eq!(disk(&format!("name=a,path=p,readonly={text}")).unwrap().config.readonly(), on);
    }
    for (text, bytes) in [("4096", 4096), ("4K", 4096), ("4k", 4096), ("1M", 1 << 20), ("1024K", 1 << 20)] {
        assert_eq!(disk(&format!("name=a,path=p,block-size={text}")).unwrap().config.block_size, bytes);
    }
    for (text, bytes) in [("off", 0), ("0", 0), ("4K", 4096), ("68K", 68 << 10), ("1024M", 1 << 30)] {
        assert_eq!(disk(&format!("name=a,path=p,background={text}")).unwrap().config.background_bytes(), bytes);
    }
    for (text, bytes) in [("\"64K\"", 64 << 10), ("65536", 64 << 10), ("\"off\"", 0), ("false", 0)] {
        let disks = file(&format!("[[disk]]\nname = \"a\"\npath = \"p\"\nbackground = {text}")).unwrap().disks;
        assert_eq!(disks[0].config.background_bytes(), bytes, "{text}");
    }
    // What an older version has written down has none.
    let old: DiskConfig = serde_json::from_str(r#"{"path": "/p"}"#).unwrap();
    assert_eq!(old.background_bytes(), 128 << 10);
    assert_eq!(u64::from(old.background_bytes()), crate::door::WINDOW_BYTES);
    assert_eq!(disk("name=a,path=p,mirror=m").unwrap().config.mirror.as_deref(), Some(Path::new("/images/m")));
    assert!(!disk("name=a,path=p,shared=off").unwrap().config.shared);
    assert_eq!(disk("name=a,path=x,,y,,,,z").unwrap().config.path, Path::new("/images/x,y,,z"));
    assert_eq!(disk("path=a=b,name=a").unwrap().config.path, Path::new("/images/a=b"));
}

#[test]
fn each_refusal_names_the_key() {
    for (text, message) in [
        ("", "\"\" is not of the form key=value"),
        ("vm1", "\"vm1\" is not of the form key=value"),
        ("name=a,path=p,", "\"\" is not of the form key=value"),
        ("path=p", "name: is missing"),
        ("name=a", "path: is missing"),
        ("name=a,path=", "path: is empty"),
        ("name=a,path=p,socket=", "socket: is empty"),
        ("name=a,path=p,mirror=", "mirror: is empty"),
        ("name=a,path=p,mirror=m,mirror=n", "mirror: is given twice"),
        ("name=a,path=p,mirror=p", "mirror: /images/p is the disk's path already"),
        ("name=a,path=p,mirror=./p", "mirror: /images/./p is the disk's path already"),
        ("name=a,path=p,mirror=m,readonly=on", "mirror: a disk with readonly=on cannot have one"),
        ("name=a,path=p,shared=1", "shared: \"1\" is neither on nor off"),
        ("name=a,path=p,layout=dense", "layout: \"dense\" is not one of auto, sparse, packed"),
        ("name=a,path=p,durability=disk", "durability: \"disk\" is not one of process, power"),
        ("name=A,path=p", "name: \"A\" is not a name"),
        ("name=,path=p", "name: a name cannot be empty"),
        ("name=a,name=a,path=p", "name: is given twice"),
        ("name=a,path=p,direct=on,direct=on", "direct: is given twice"),
        ("name=a,path=p,size=1", "\"size\" is not a key; the keys are name, path"),
        ("name=a,path=p,block_size=4K", "\"block_size\" is not a key"),
        ("name=a,path=p,queues=0", "queues: 0 is not from 1 to 16"),
        ("name=a,path=p,queues=17", "queues: 17 is not from 1 to 16"),
        ("name=a,path=p,queues=two", "queues: \"two\" is not a number"),
        ("name=a,path=p,direct=maybe", "direct: \"maybe\" is neither on nor off"),
        ("name=a,path=p,block-size=512", "block-size: 512 is not a power of two"),
        ("name=a,path=p,block-size=5K", "block-size: 5120 is not a power of two"),
        ("name=a,path=p,block-size=2M", "block-size: 2097152 is not a power of two"),
        ("name=a,path=p,block-size=K", "block-size: \"K\" is not a size"),
        ("name=a,path=p,block-size=+4K", "block-size: \"+4K\" is not a size"),
        ("name=a,path=p,block-size=4294967295M", "block-size: \"4294967295M\" is not a size"),
        ("name=a,path=p,background=on", "background: \"on\" is neither off nor a size"),
        ("name=a,path=p,background=5000", "background: 5000 is neither off nor a multiple of 4K"),
        ("name=a,path=p,background=1025M", "background: 1074790400 is neither off nor a multiple of 4K up to 1024M"),
        ("name=a,path=p,serial=", "serial: \"\" is not 1 to 20"),
        ("name=a,path=p,serial=123456789012345678901", "serial: \"123456789012345678901\" is not 1 to 20"),
        ("name=a,path=p,serial=é", "serial: \"é\" has characters other than"),
    ] {
        let error = disk(text).unwrap_err();
        assert!(error.starts_with(message), "{text:?}: {error:?}");
        assert!(!error.contains('\n'));
    }
}

#[test]
fn defaults_of_root_and_of_others() {
    let root = Environment { root: true, ..user() };
    let config = options(&[]).resolve(&root).unwrap();
    assert_eq!(config.state_dir, Path::new("/var/lib/halfsilver"));
    assert_eq!(config.run_dir, Path::new("/run/halfsilver"));
    assert_eq!(config.control, Path::new("/run/halfsilver/control.sock"));

    let config = options(&["name=vm1,path=a/vm1.raw"]).resolve(&user()).unwrap();
    assert_eq!(config.state_dir, Path::new("/home/u/.local/state/halfsilver"));
    assert_eq!(config.control, Path::new("/run/user/7/halfsilver/control.sock"));
    assert_eq!(config.disks[0].config.path, Path::new("/home/u/a/vm1.raw"));
    assert_eq!(config.disks[0].config.socket.as_deref(), Some(Path::new("/run/user/7/halfsilver/vm1.sock")));

    let with_state_home = Environment { state_home: Some("/s".into()), ..user() };
    assert_eq!(options(&[]).resolve(&with_state_home).unwrap().state_dir, Path::new("/s/halfsilver"));
    let nowhere = Environment { runtime_dir: None, ..user() };
    assert!(options(&[]).resolve(&nowhere).unwrap_err().to_string().contains("--run-dir"));
    let with_run_dir = ServeOptions { run_dir: Some("r".into()), ..options(&[]) };
    assert_eq!(with_run_dir.resolve(&nowhere).unwrap().control, Path::new("/home/u/r/control.sock"));
}

#[test]
fn a_file_with_every_key() {
    let config = file(
        r#"
control = "/c.sock"
state-dir = "state"
run-dir = "/run"
[[disk]]
name = "vm1"
path = "vm1.raw"
mirror = "copy/vm1.raw"
shared = true
durability = "power"
layout = "packed"
queues = 4
direct = "off"
block-size = "8K"
[[disk]]
name = "vm2"
path = "/vm2.raw"
readonly = true
block-size = 4096
"#,
    )
    .unwrap();
    assert_eq!(config.control.as_deref(), Some(Path::new("/c.sock")));
    assert_eq!(config.state_dir.as_deref(), Some(Path::new("/etc/halfsilver/state")));
    let [vm1, vm2] = &config.disks[..] else { panic!("{config:?}") };
    assert_eq!(vm1.config.path, Path::new("/etc/halfsilver/vm1.raw"));
    assert_eq!(vm1.config.mirror.as_deref(), Some(Path::new("/etc/halfsilver/copy/vm1.raw")));
    assert_eq!((vm1.config.queues(), vm1.config.direct, vm1.config.shared), (4, false, true));
    assert_eq!((vm1.config.durability(), vm2.config.durability()), (Durability::Power, Durability::Process));
    assert_eq!((vm1.config.layout(), vm2.config.layout()), (Layout::Packed, Layout::Auto));
    assert_eq!((vm2.config.readonly(), vm2.config.shared, &vm2.config.mirror), (true, false, &None));
    assert_eq!((vm1.config.block_size, vm2.config.block_size), (8192, 4096));
}

#[test]
fn a_wrong_file_is_refused_with_its_line() {
    for (text, line, message) in [
        ("control = 1", 1, "invalid type"),
        ("\nstate_dir = \"/s\"", 2, "unknown field `state_dir`"),
        ("[[disk]]\nname = \"a\"\nname = \"b\"", 3, "duplicate key"),
        ("[disk]\nname = \"a\"", 1, "invalid type"),
        ("control = ", 1, ""),
    ] {
        let error = file(text).unwrap_err();
        let place = format!("/etc/halfsilver/halfsilver.toml:{line}: ");
        assert!(error.starts_with(&place) && error.contains(message), "{text:?}: {error:?}");
        assert!(!error.contains('\n'), "{error:?}");
    }
}

/// A disk of the file that is wrong is left out, with its line and its name if it has one, and the others are not.
#[test]
fn a_wrong_disk_of_a_file_takes_no_other_with_it() {
    let good = "[[disk]]\nname = \"good\"\npath = \"p\"\n";
    for (table, name, message) in [
        ("name = \"a\"\npath = \"p\"\nsize = 4", Some("a"), "unknown field `size`"),
        ("name = \"a\"", Some("a"), "path: is missing"),
        ("name = \"a\"\npath = \"p\"\nqueues = 99", Some("a"), "queues: 99"),
        ("name = \"a\"\npath = \"p\"\nlayout = \"dense\"", Some("a"), "dense"),
        ("name = \"a\"\npath = \"p\"\ndirect=\"maybe\"", Some("a"), "neither on nor off"),
        ("name = \"a\"\npath = 7", Some("a"), "invalid type"),
        ("path = \"p\"", None, "name: is missing"),
        ("name = \"A/b\"\npath = \"p\"", None, "name: \"A/b\" is not a name"),
        ("name = 7\npath = \"p\"", None, "invalid type"),
        ("name = \"good\"\npath = \"q\"", Some("good"), "name: two disks are named good"),
    ] {
        let config = file(&format!("{good}[[disk]]\n{table}\n[[disk]]\nname = \"other\"\npath = \"q\"")).unwrap();
        let names: Vec<_> = config.disks.iter().map(|disk| disk.name.as_str()).collect();
        assert_eq!(names, ["good", "other"], "{table}");
        let [bad] = &config.bad_disks[..] else { panic!("{table}: {config:?}") };
        assert_eq!(bad.name.as_ref().map(Name::as_str), name, "{table}");
        assert!(bad.why.starts_with("/etc/halfsilver/halfsilver.toml:4: ") && bad.why.contains(message), "{bad:?}");
        assert!(!bad.why.contains('\n'), "{bad:?}");
    }
}

/// Of two that share a socket the first one has it; what the command line says beats the file, and is right or refused.
#[test]
fn a_disk_of_a_file_without_a_socket_of_its_own_is_left_out() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("halfsilver.toml");
    let table = |name: &str, rest: &str| format!("[[disk]]\nname = \"{name}\"\npath = \"/{name}.raw\"\n{rest}\n");
    let text = [
        table("vm1", "socket = \"/s\""),
        table("vm2", "socket = \"/s\""),
        table("control", ""),
        table("vm3", "queues = 99"),
        table(&"x".repeat(60), &format!("socket = \"/{}\"", "y".repeat(107))),
    ];
    fs::write(&path, text.concat()).unwrap();
    let given = |disks: &[&str]| ServeOptions { config: Some(path.clone()), ..options(disks) };
    let config = given(&[]).resolve(&user()).unwrap();
    assert_eq!(config.disks.iter().map(|disk| disk.name.as_str()).collect::<Vec<_>>(), ["vm1"]);
    let bad: Vec<_> = config.bad_disks.iter().map(|bad| bad.name.as_ref().unwrap().as_str()).collect();
    assert_eq!(bad, ["vm3", &"x".repeat(60), "vm2", "control"]);
    assert_eq!(config.bad_disks[2].why, "socket: disk vm1 and disk vm2 share /s");
    let config = given(&["name=vm3,path=/p", "name=vm9,path=/q,socket=/s"]).resolve(&user()).unwrap();
    assert_eq!(config.disks.iter().map(|disk| disk.name.as_str()).collect::<Vec<_>>(), ["vm3", "vm9"]);
    let strict = ServeOptions { strict: true, ..given(&[]) };
    assert!(strict.resolve(&user()).unwrap_err().to_string().contains("queues: 99"));
}

#[test]
fn the_command_line_beats_the_file() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("halfsilver.toml");
    let text = "control = \"/file.sock\"\nrun-dir = \"/file\"\n[[disk]]\nname = \"vm1\"\npath = \"/file.raw\"\n\
        [[disk]]\nname = \"vm2\"\npath = \"/vm2.raw\"\n";
    fs::write(&path, text).unwrap();
    let given = ServeOptions {
        config: Some(path),
        control: Some("/given.sock".into()),
        ..options(&["name=vm1,path=/given.raw"])
    };
    let config = given.resolve(&user()).unwrap();
    assert_eq!(config.control, Path::new("/given.sock"));
    assert_eq!(config.run_dir, Path::new("/file"));
    let paths: Vec<_> = config.disks.iter().map(|disk| disk.config.path.to_str().unwrap()).collect();
    assert_eq!(paths, ["/vm2.raw", "/given.raw"]);
    let missing = ServeOptions { config: Some("/no/such".into()), ..options(&[]) };
    assert!(missing.resolve(&user()).unwrap_err().to_string().starts_with("cannot read /no/such: "));
}

#[test]
fn names_and_sockets_are_not_shared() {
    for (disks, message) in [
        (&["name=a,path=p", "name=a,path=q"], "--disk: name: two disks are named a"),
        (&["name=a,path=p,socket=/s", "name=b,path=q,socket=/s"], "socket: disk a and disk b share /s"),
        (
            &["name=a,path=p", "name=control,path=q"],
            "socket: the control socket and disk control share /run/user/7/halfsilver/control.sock",
        ),
    ] {
        assert_eq!(options(disks).resolve(&user()).unwrap_err().to_string(), message);
    }
    let long = ServeOptions { control: Some(format!("/{}", "x".repeat(107)).into()), ..options(&[]) };
    assert!(long.resolve(&user()).unwrap_err().to_string().contains("at most 107"));
}

proptest::proptest! {
    #[test]
    fn any_text_is_taken_or_refused_in_one_line(text in "(name|path|queues|block-size|serial|direct|[a-z\\PC\n,=K]){0,8}") {
        match disk(&text) {
            Ok(spec) => proptest::prop_assert!(spec.config.check().is_ok()),
            Err(message) => proptest::prop_assert!(!message.contains('\n')),
        }
    }
}
