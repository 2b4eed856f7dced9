"""The kernels in Triton; nothing else imports it."""
