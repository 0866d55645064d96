"""The commands, by what a user wants to do: logs, this machine, studies, servers, the nightly job."""
