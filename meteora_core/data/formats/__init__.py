"""Conversion of users' datasets, in common file formats and with common columns, to rows.

``files`` detects the kind of a file and unpacks it, ``tables`` reads files as records, ``columns`` finds the meaning of columns, ``conversations`` parses
chats, ``examples`` turns every record into a row, ``sources`` finds the splits, and ``folders`` finds the datasets in a folder.
"""
