//! The one binary, `halfsilver`; see the `cli` room.

fn main() -> std::process::ExitCode {
    halfsilver::cli::run()
}
