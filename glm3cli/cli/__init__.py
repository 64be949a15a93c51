"""The command line: parse options, call one function of the core, print its result."""
