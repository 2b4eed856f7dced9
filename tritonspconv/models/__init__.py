"""Networks that the demonstration, the timings and the tests run."""
