"""EasyEdit, the host: mending it, registering KDPO with it, and running its methods. Importing this imports EasyEdit."""

from .registering import register

register()
