"""Every test process waits for its threads asleep; see `linerate.__main__.let_threads_sleep`."""

from linerate.__main__ import let_threads_sleep

let_threads_sleep()
