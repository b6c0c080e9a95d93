"""The table of PEFT methods in feature space, measured one by one."""
