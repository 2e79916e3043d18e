"""The battery: programs that try to escape or to cheat, one small file each, and the code that tries them."""
