"""Many sends in one system call: a small io_uring, where the kernel lets us have one."""
