//! The one binary, `halfsilver`; see the `cli` room.

fn main() -> std::process::ExitCode {
    #[cfg(feature = "planted")]
    halfsilver::mirror::planted::plant_from_environment();
    halfsilver::cli::run()
}
