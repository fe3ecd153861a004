//! A rough look at the cost of a request; run it by name, in release, with --ignored --nocapture.
