//! A frontend that makes its memory file smaller behind our mapping.

use std::time::Duration;

use super::ring::*;
use super::support::*;

#[test]
fn a_memory_file_that_shrinks_closes_its_connection_only() {
    let _alone = alone();
    let server = TestServer::new(1, false);
    let other = TestServer::new(1, false);
    let mut neighbour = Guest::new(&other.socket(), 1);
    // Where the file ends: before the rings, between rings and data, between status and data.
    for (name, len) in [("nothing left", 0), ("rings left", 0x10_0000), ("all but the data", 0x20_3000)] {
        let mut guest = Guest::new(&server.socket(), 1);
        guest.read_sectors(0, 512);
        guest.header(T_IN, 8);
        guest.chain(0, 0, &[(HEADER, 16, 0), (DATA, 4096, WRITE), (STATUS, 1, WRITE)]);
        guest.announce(0, 0);
        guest.memory.file.set_len(len).unwrap();
        guest.kick(0);
        until(name, || !server.handle.is_connected());
        neighbour.read_sectors(0, 512);
        // The guest's own mapping is gone too: it must not be touched any more.
        drop(guest);
        Guest::new(&server.socket(), 1).read_sectors(0, 512);
        server.wait_idle();
    }
}

/// The program as it is: a shrunk file must not end it, a SIGBUS from elsewhere must.
#[test]
fn the_program_survives_a_shrunk_file_and_no_other_sigbus() {
    use std::os::unix::process::ExitStatusExt;
    let _alone = alone();
    let mut program = super::program::Program::start(&[]);
    for _ in 0..3 {
        let guest = {
            let mut guest = Guest::new(&program.socket(), 1);
            guest.read_sectors(0, 512);
            guest.announce(0, 0);
            guest.memory.file.set_len(0).unwrap();
            guest.kick(0);
            guest
        };
        std::thread::sleep(Duration::from_millis(50));
        drop(guest);
        assert!(program.child.try_wait().unwrap().is_none(), "the program died");
    }
    Guest::new(&program.socket(), 1).read_sectors(0, 512);
    program.signal(rustix::process::Signal::BUS);
    assert_eq!(program.child.wait().unwrap().signal(), Some(libc::SIGBUS));
}
