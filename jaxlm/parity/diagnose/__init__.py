"""The reasons why two models differ, tried one by one."""
