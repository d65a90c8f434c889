"""How evenly routers spread tokens over experts: loads → statistics → verdict, and the command that says so.

The command reads counts and prints their analysis; a run's routing metrics use `statistics` alone.
"""

from switch_bank.balance.command import main

__all__ = ["main"]
