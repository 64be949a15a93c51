"""The models of the family, as data: what differs among them, and how a folder shows which it is.

Begin with `members`: the one table of the models that glm3 takes, and the traits that its rows
share. `recognise.recognise` is its one reader: it finds the member by the files of a folder.
`refused` names the relatives that glm3 doesn't take, and says why. No other module asks for a
model's name: what differs from member to member is a trait of the table.
"""
